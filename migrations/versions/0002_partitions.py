"""Partition metrics by day: ensure_partitions() makes them ahead of time, drop_partitions() forgets the old ones.

Revision ID: 0002
Revises: 0001
"""

from alembic import op
from phalanx_server.store.migrate import run_script

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Partitions are named <table>_YYYYMMDD by their first day (UTC): metrics by day, metric_rollups by week from Monday.
# Rows that came before their partition wait in <table>_rest; making the partition moves them: PostgreSQL refuses a
# partition whose rows are in the default one, so they are taken out first, in the same transaction. Only <table>_rest
# is locked: who writes to partitions that exist does not wait.
UP = """
CREATE FUNCTION ensure_partition(parent text, key text, lower_bound timestamptz, upper_bound timestamptz)
RETURNS boolean LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    child text := parent || '_' || to_char(lower_bound, 'YYYYMMDD');
BEGIN
    IF to_regclass(child) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('ensure_partition'), hashtext(parent));
    IF to_regclass(child) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', parent || '_rest');
    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', child, parent);
    EXECUTE format(
        'WITH moved AS (DELETE FROM %I WHERE %I >= $1 AND %I < $2 RETURNING *) INSERT INTO %I SELECT * FROM moved',
        parent || '_rest', key, key, child
    ) USING lower_bound, upper_bound;
    EXECUTE format(
        'ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', parent, child, lower_bound, upper_bound
    );
    RETURN true;
END $$;

CREATE FUNCTION ensure_partitions(since timestamptz, until timestamptz)
RETURNS integer LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    made integer := 0;
    lower_bound timestamptz;
BEGIN
    FOR lower_bound IN SELECT generate_series(date_trunc('day', since), until, interval '1 day') LOOP
        made := made + ensure_partition('metrics', 'at', lower_bound, lower_bound + interval '1 day')::integer;
    END LOOP;
    FOR lower_bound IN SELECT generate_series(date_trunc('week', since), until, interval '1 week') LOOP
        made := made
            + ensure_partition('metric_rollups', 'bucket', lower_bound, lower_bound + interval '1 week')::integer;
    END LOOP;
    RETURN made;
END $$;

CREATE FUNCTION drop_partitions(parent text, key text, before timestamptz)
RETURNS integer LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    dropped integer := 0;
    days interval := CASE parent WHEN 'metrics' THEN interval '1 day' ELSE interval '1 week' END;
    child text;
BEGIN
    FOR child IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = to_regclass(parent) AND c.relname ~ ('^' || parent || '_[0-9]{8}$') ORDER BY c.relname
    LOOP
        IF to_date(right(child, 8), 'YYYYMMDD')::timestamptz + days <= before THEN
            EXECUTE format('DROP TABLE %I', child);
            dropped := dropped + 1;
        END IF;
    END LOOP;
    EXECUTE format('DELETE FROM %I WHERE %I < $1', parent || '_rest', key) USING before;
    RETURN dropped;
END $$;

SELECT ensure_partitions(now(), now() + interval '2 days');
"""

# The rows go back to where they would be without the functions.
DOWN = """
DO $$
DECLARE
    parent text;
    child text;
BEGIN
    SET LOCAL timezone = 'UTC';
    FOREACH parent IN ARRAY ARRAY['metrics', 'metric_rollups'] LOOP
        FOR child IN
            SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = to_regclass(parent) AND c.relname ~ ('^' || parent || '_[0-9]{8}$')
        LOOP
            EXECUTE format('ALTER TABLE %I DETACH PARTITION %I', parent, child);
            EXECUTE format('INSERT INTO %I SELECT * FROM %I', parent, child);
            EXECUTE format('DROP TABLE %I', child);
        END LOOP;
    END LOOP;
END $$;
DROP FUNCTION drop_partitions(text, text, timestamptz);
DROP FUNCTION ensure_partitions(timestamptz, timestamptz);
DROP FUNCTION ensure_partition(text, text, timestamptz, timestamptz);
"""


def upgrade() -> None:
    run_script(op.get_bind(), UP)


def downgrade() -> None:
    run_script(op.get_bind(), DOWN)
