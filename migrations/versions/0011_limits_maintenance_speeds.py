"""Waiting jobs that have run before, for time limits over all attempts; and maintenance windows.

Revision ID: 0011
Revises: 0010
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# A window covers the nodes that it names and those that have all of its labels.
UP = """
CREATE INDEX jobs_tried ON jobs (id) WHERE state = 'queued' AND attempts > 0;

CREATE TABLE maintenance (
    id              uuid PRIMARY KEY,
    nodes           uuid[] NOT NULL DEFAULT '{}',
    labels          jsonb NOT NULL DEFAULT '{}',
    starts_at       timestamptz NOT NULL,
    ends_at         timestamptz NOT NULL,
    reason          text NOT NULL,
    created_by      text NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    version         bigint NOT NULL DEFAULT 1,
    CHECK (starts_at < ends_at),
    CHECK (cardinality(nodes) > 0 OR labels <> '{}')
);
CREATE INDEX maintenance_ends ON maintenance (ends_at);
"""
DOWN = """
DROP TABLE maintenance;
DROP INDEX jobs_tried;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
