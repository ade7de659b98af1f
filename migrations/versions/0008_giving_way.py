"""Why an attempt gives way, where it goes on, and the place that is kept for a job that waits.

Revision ID: 0008
Revises: 0007
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# What is kept for a job is part of its scheduling state: it must show as a change of the job.
UP = """
ALTER TABLE attempts ADD COLUMN stop_reason text, ADD COLUMN stop_for uuid, ADD COLUMN next jsonb;
CREATE INDEX attempts_next ON attempts (id) WHERE state = 'stopping' AND next IS NOT NULL;
ALTER TABLE holds ADD COLUMN kept jsonb;
CREATE INDEX holds_kept ON holds (job_id) WHERE kept IS NOT NULL;

CREATE FUNCTION touch_job_of_hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE jobs SET version = version WHERE id = NEW.job_id;
    RETURN NULL;
END $$;
CREATE TRIGGER touch_job_of_new_hold AFTER INSERT ON holds
    FOR EACH ROW WHEN (NEW.kept IS NOT NULL) EXECUTE FUNCTION touch_job_of_hold();
CREATE TRIGGER touch_job_of_hold AFTER UPDATE OF kept ON holds
    FOR EACH ROW WHEN (OLD.kept IS DISTINCT FROM NEW.kept) EXECUTE FUNCTION touch_job_of_hold();
"""
DOWN = """
DROP TRIGGER touch_job_of_hold ON holds;
DROP TRIGGER touch_job_of_new_hold ON holds;
DROP FUNCTION touch_job_of_hold;
DROP INDEX holds_kept;
ALTER TABLE holds DROP COLUMN kept;
DROP INDEX attempts_next;
ALTER TABLE attempts DROP COLUMN next, DROP COLUMN stop_for, DROP COLUMN stop_reason;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
