"""Traces that are asked for while a job runs: a row for each request, and one for each rank that it is asked of.

Revision ID: 0014
Revises: 0013
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE profiles (
    id         uuid PRIMARY KEY,
    job_id     uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt_id uuid NOT NULL REFERENCES attempts (id) ON DELETE CASCADE,
    steps      integer NOT NULL CHECK (steps BETWEEN 1 AND 100),
    created_by text NOT NULL,
    created_at timestamptz NOT NULL,
    closed_at  timestamptz
);
CREATE INDEX profiles_job ON profiles (job_id, id);
CREATE UNIQUE INDEX profiles_open ON profiles (attempt_id) WHERE closed_at IS NULL;

CREATE TABLE profile_ranks (
    profile_id uuid NOT NULL REFERENCES profiles (id) ON DELETE CASCADE,
    rank       integer NOT NULL CHECK (rank >= 0),
    state      text NOT NULL DEFAULT 'requested' CHECK (state IN ('requested', 'recording', 'ready', 'failed')),
    reason     text NOT NULL DEFAULT '',
    bytes      bigint CHECK (bytes >= 0),
    hash       text CHECK (hash ~ '^[0-9a-f]{64}$'),
    url        text,
    PRIMARY KEY (profile_id, rank),
    CHECK ((state = 'ready') = (url IS NOT NULL AND bytes IS NOT NULL AND hash IS NOT NULL))
);
"""
DOWN = """
DROP TABLE profile_ranks;
DROP TABLE profiles;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
