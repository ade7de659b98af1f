"""Waiting jobs that have run before, for time limits over all attempts.

Revision ID: 0011
Revises: 0010
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UP = """
CREATE INDEX jobs_tried ON jobs (id) WHERE state = 'queued' AND attempts > 0;
"""
DOWN = """
DROP INDEX jobs_tried;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
