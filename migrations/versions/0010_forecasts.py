"""Between when and when a waiting job is expected to start, and what was first said of each job, to compare with what
came of it; and what was released when, for what tenants have used.

Revision ID: 0010
Revises: 0009
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# `forecasts` is only compared with what came: when the first attempt was created, and how long the attempts ran.
UP = """
ALTER TABLE holds ADD COLUMN estimated_start_low timestamptz, ADD COLUMN estimated_start_high timestamptz;

CREATE TABLE forecasts (
    job_id          uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    said_at         timestamptz,
    start           timestamptz,
    start_low       timestamptz,
    start_high      timestamptz,
    run_s           double precision,
    run_low_s       double precision,
    run_high_s      double precision
);

CREATE INDEX placements_released ON placements (released_at) WHERE released_at IS NOT NULL;
"""
DOWN = """
DROP INDEX placements_released;
DROP TABLE forecasts;
ALTER TABLE holds DROP COLUMN estimated_start_low, DROP COLUMN estimated_start_high;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
