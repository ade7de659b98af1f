"""Job arrays, dependencies between jobs, deadlines, and the policy as it is set through the API.

Revision ID: 0009
Revises: 0008
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# `dependencies` holds what is unmet alone, and `jobs.unmet` how many rows that are: a job without any costs no look.
# `on_id` is a job or an array.
UP = """
ALTER TABLE jobs
    ADD COLUMN deadline timestamptz,
    ADD COLUMN array_id uuid,
    ADD COLUMN array_index integer,
    ADD COLUMN array_max_running integer,
    ADD COLUMN unmet integer NOT NULL DEFAULT 0,
    ADD CHECK ((array_id IS NULL) = (array_index IS NULL));
CREATE INDEX jobs_array ON jobs (array_id, array_index) WHERE array_id IS NOT NULL;
CREATE INDEX jobs_array_open ON jobs (array_id) WHERE array_id IS NOT NULL AND finished_at IS NULL;

CREATE TABLE dependencies (
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    on_id           uuid NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('ok', 'any')),
    PRIMARY KEY (job_id, on_id, kind)
);
CREATE INDEX dependencies_on ON dependencies (on_id);

CREATE TABLE policy (
    id              integer PRIMARY KEY CHECK (id = 1),
    settings        jsonb NOT NULL DEFAULT '{}',
    version         bigint NOT NULL DEFAULT 1,
    changed_xid     xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE TRIGGER touch BEFORE UPDATE ON policy FOR EACH ROW EXECUTE FUNCTION touch();
INSERT INTO policy (id) VALUES (1);
"""
DOWN = """
DROP TABLE policy, dependencies;
ALTER TABLE jobs DROP COLUMN deadline, DROP COLUMN array_id, DROP COLUMN array_index, DROP COLUMN array_max_running,
    DROP COLUMN unmet;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
