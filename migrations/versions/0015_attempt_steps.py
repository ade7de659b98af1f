"""What attempts said of their steps, which outlives the metrics that it was read from.

Of attempts that are there it is read from the metrics that still are. Those of which nobody knows whether their job
reports a loss go by the first of the names that it reported last.

Revision ID: 0015
Revises: 0014
"""

from alembic import op
from phalanx_server.store.migrate import fill_in_batches, run_script

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE IF NOT EXISTS attempt_steps (
    attempt_id    uuid PRIMARY KEY REFERENCES attempts ON DELETE CASCADE,
    of_training   boolean NOT NULL,
    first_step    bigint NOT NULL,
    first_step_at timestamptz NOT NULL,
    last_step     bigint NOT NULL,
    last_step_at  timestamptz NOT NULL,
    totals        jsonb NOT NULL DEFAULT '{}'
);
"""
_POINT = """
    SELECT m.step, m.at, m.value FROM metrics m
    WHERE m.job_id = a.job_id AND m.name = {name} AND m.attempt_id = a.id AND m.rank = 0 AND m.step IS NOT NULL
      AND m.at >= a.created_at - interval '1 hour' AND m.at <= coalesce(a.ended_at, 'infinity') + interval '1 hour'
    ORDER BY m.at {order} LIMIT 1
"""
FILL = f"""
INSERT INTO attempt_steps (attempt_id, of_training, first_step, first_step_at, last_step, last_step_at, totals)
SELECT a.id, steps_of.name IN ('loss', 'productive_s'), first.step, first.at, last.step, last.at,
       coalesce(totals.said, '{{}}')
FROM attempts a LEFT JOIN progress p ON p.job_id = a.job_id
CROSS JOIN LATERAL (
    SELECT coalesce((SELECT name FROM jsonb_object_keys(p."values") AS name
                     ORDER BY name <> 'loss', name <> 'productive_s', name LIMIT 1), 'loss') AS name) AS steps_of
CROSS JOIN LATERAL ({_POINT.format(name="steps_of.name", order="ASC")}) AS first
CROSS JOIN LATERAL ({_POINT.format(name="steps_of.name", order="DESC")}) AS last
CROSS JOIN LATERAL (
    SELECT jsonb_object_agg(wanted.name, newest.value) AS said
    FROM unnest(ARRAY['productive_s', 'data_wait_total_s', 'checkpoint_total_s', 'lost_s']) AS wanted (name)
    CROSS JOIN LATERAL ({_POINT.format(name="wanted.name", order="DESC")}) AS newest) AS totals
WHERE a.id = ANY(:batch)
ON CONFLICT DO NOTHING
"""
# Not those that were done before this was cut off, nor those whose metrics are forgotten: partitions are named by day.
TO_FILL = """
NOT EXISTS (SELECT FROM attempt_steps s WHERE s.attempt_id = attempts.id)
AND coalesce(ended_at, 'infinity') > least(
    (SELECT min(at) FROM metrics_rest),
    (SELECT min(to_date(right(relname, 8), 'YYYYMMDD')) FROM pg_inherits JOIN pg_class ON oid = inhrelid
     WHERE inhparent = to_regclass('metrics') AND relname <> 'metrics_rest')) - interval '1 day'
"""
DOWN = """
DROP TABLE attempt_steps;
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)
    fill_in_batches(op.get_context(), "attempts", "id", FILL, where=TO_FILL)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
