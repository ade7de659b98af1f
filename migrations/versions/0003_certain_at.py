"""When the ranks of a lost attempt have certainly ended by themselves, wherever they were.

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
"""
DOWN = """
ALTER TABLE attempts DROP COLUMN certain_at;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
