"""What an agent keeps for the server; jobs by their end and how far their files are forgotten; indexes for the rest.

Revision ID: 0007
Revises: 0006
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE clusters ADD COLUMN agent_backlog jsonb;
CREATE INDEX jobs_finished ON jobs (finished_at, id) WHERE finished_at IS NOT NULL;
CREATE INDEX outbox_delivered ON outbox (delivered_at) WHERE delivered_at IS NOT NULL;
CREATE INDEX tokens_expired ON tokens (expires_at) WHERE kind = 'node';
CREATE TABLE retention (
    what text PRIMARY KEY,
    finished_at timestamptz NOT NULL,
    job_id uuid NOT NULL
);
"""
DOWN = """
DROP TABLE retention;
DROP INDEX tokens_expired;
DROP INDEX outbox_delivered;
DROP INDEX jobs_finished;
ALTER TABLE clusters DROP COLUMN agent_backlog;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
