"""The newest jobs that ran and ended, found without those that were cancelled before; and what a waiting job was first
told of its start, kept for as long as it waits.

Revision ID: 0012
Revises: 0011
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

UP = """
CREATE INDEX jobs_ran ON jobs (state, id DESC) WHERE attempts > 0 AND finished_at IS NOT NULL;

ALTER TABLE holds ADD COLUMN first_start timestamptz, ADD COLUMN first_start_low timestamptz,
                  ADD COLUMN first_start_high timestamptz;
"""
DOWN = """
ALTER TABLE holds DROP COLUMN first_start, DROP COLUMN first_start_low, DROP COLUMN first_start_high;
DROP INDEX jobs_ran;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
