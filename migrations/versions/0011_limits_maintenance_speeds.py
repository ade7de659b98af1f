"""Waiting jobs that have run before, for time limits over all attempts; maintenance windows; and how fast elastic
jobs are with each number of replicas.

Revision ID: 0011
Revises: 0010
"""

from alembic import op
from phalanx_server.store.migrate import build_indexes, run_script

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# A window covers the nodes that it names and those that have all of its labels.
# `speeds`: `speed` is what passes are told, and `history` what earlier jobs of the kind had, relative to one replica.
INDEXES = {
    "jobs_tried": "jobs (id) WHERE state = 'queued' AND attempts > 0",
    "jobs_elastic": "jobs (id) WHERE state = 'running' AND spec->'resources'->'elastic' <> 'null'",
}
UP = """
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

CREATE TABLE speeds (
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    gpu_type        text NOT NULL,
    replicas        integer NOT NULL,
    unit            text,
    attempt_id      uuid,
    at              timestamptz,
    step            bigint,
    work            double precision NOT NULL DEFAULT 0,
    seconds         double precision NOT NULL DEFAULT 0,
    counted         bigint NOT NULL DEFAULT 0,
    speed           double precision,
    history         double precision,
    PRIMARY KEY (job_id, gpu_type, replicas)
);
"""
DOWN = """
DROP INDEX jobs_elastic;
DROP TABLE speeds, maintenance;
DROP INDEX jobs_tried;
"""


def upgrade() -> None:
    build_indexes(op.get_context(), INDEXES)
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
