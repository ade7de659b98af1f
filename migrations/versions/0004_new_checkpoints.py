"""Let a pass ask for new checkpoints, and retention for the jobs that use a bundle.

Revision ID: 0004
Revises: 0003
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE checkpoints ADD COLUMN changed_xid xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX checkpoints_changed ON checkpoints (changed_xid);
CREATE INDEX jobs_bundle ON jobs (tenant_id, bundle) WHERE bundle IS NOT NULL;
"""
DOWN = """
DROP INDEX jobs_bundle;
ALTER TABLE checkpoints DROP COLUMN changed_xid;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
