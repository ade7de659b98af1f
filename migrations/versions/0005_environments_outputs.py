"""Keep registered environments, and what jobs leave as outputs.

Revision ID: 0005
Revises: 0004
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE environments (
    id           uuid PRIMARY KEY,
    tenant_id    uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name         text NOT NULL,
    requirements jsonb NOT NULL,
    created_by   text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, name)
);

CREATE TABLE outputs (
    job_id     uuid NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt_id uuid NOT NULL REFERENCES attempts (id) ON DELETE CASCADE,
    group_rank integer NOT NULL CHECK (group_rank >= 0),
    path       text NOT NULL CHECK (octet_length(path) BETWEEN 1 AND 1024),
    bytes      bigint NOT NULL CHECK (bytes >= 0),
    hash       text NOT NULL CHECK (hash ~ '^[0-9a-f]{64}$'),
    url        text NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (attempt_id, group_rank, path)
);
CREATE INDEX outputs_job ON outputs (job_id, path);
"""
DOWN = """
DROP TABLE outputs;
DROP TABLE environments;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
