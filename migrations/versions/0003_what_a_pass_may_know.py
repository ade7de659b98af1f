"""What a pass may know beside its jobs: when the ranks of a lost attempt have certainly ended, and new checkpoints.

Revision ID: 0003
Revises: 0002
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE attempts ADD COLUMN certain_at timestamptz;
ALTER TABLE checkpoints ADD COLUMN changed_xid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX checkpoints_changed ON checkpoints (changed_xid);
"""
DOWN = """
ALTER TABLE checkpoints DROP COLUMN changed_xid;
ALTER TABLE attempts DROP COLUMN certain_at;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
