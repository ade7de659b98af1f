"""The newest jobs that ran and ended, found without those that were cancelled before; and what a waiting job was first
told of its start, kept for as long as it waits.

Of jobs that wait now, what was first said is in `forecasts` if they never ran. Of others it is what they are told now,
or, where that is nothing, the first that a later pass says.

Revision ID: 0012
Revises: 0011
"""

from alembic import op
from phalanx_server.store.migrate import build_indexes, fill_in_batches, run_script

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

INDEXES = {"jobs_ran": "jobs (state, id DESC) WHERE attempts > 0 AND finished_at IS NOT NULL"}
UP = """
ALTER TABLE holds ADD COLUMN IF NOT EXISTS first_start timestamptz,
                  ADD COLUMN IF NOT EXISTS first_start_low timestamptz,
                  ADD COLUMN IF NOT EXISTS first_start_high timestamptz;
"""
FORECAST = """
UPDATE holds h SET first_start = f.start, first_start_low = f.start_low, first_start_high = f.start_high
FROM forecasts f JOIN jobs j ON j.id = f.job_id
WHERE h.job_id = ANY(:batch) AND h.first_start IS NULL
  AND f.job_id = h.job_id AND j.attempts = 0 AND f.start IS NOT NULL
"""
ESTIMATED = """
UPDATE holds SET first_start = estimated_start, first_start_low = estimated_start_low,
                 first_start_high = estimated_start_high
WHERE job_id = ANY(:batch) AND first_start IS NULL AND estimated_start IS NOT NULL
"""
DOWN = """
ALTER TABLE holds DROP COLUMN first_start, DROP COLUMN first_start_low, DROP COLUMN first_start_high;
DROP INDEX jobs_ran;
"""


def upgrade() -> None:
    build_indexes(op.get_context(), INDEXES)
    run_script(op.get_bind(), UP)
    fill_in_batches(op.get_context(), "holds", "job_id", FORECAST, ESTIMATED)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
