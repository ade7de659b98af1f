"""The migrations build what the schema says, keep what is there, let those who write go on, and go back."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from phalanx_server.store import migrate
from phalanx_server.store.engine import create_engine
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import (
    attempt_steps,
    attempts,
    clusters,
    holds,
    jobs,
    metadata,
    metrics,
    progress,
    tenants,
)
from sqlalchemy import func, insert, inspect, make_url, select, text

IGNORED = ("alembic_version",)


def _ours(name: str | None, kind: str, parents: dict) -> bool:
    if kind == "schema":
        return True
    if kind == "table":
        return name in metadata.tables
    return parents.get("table_name") in metadata.tables


def _differences(connection) -> list:
    context = MigrationContext.configure(
        connection, opts={"include_name": _ours, "compare_type": True, "compare_server_default": True}
    )
    return compare_metadata(context, metadata)


def _column_facts(connection) -> dict:
    """Type, nullability, default and identity of every column, and every key and index, as the database has them."""
    inspector = inspect(connection)
    facts = {}
    for table in metadata.tables:
        columns = {
            column["name"]: (str(column["type"]), column["nullable"], column["default"], bool(column.get("identity")))
            for column in inspector.get_columns(table)
        }
        keys = {tuple(key["constrained_columns"]): key["referred_table"] for key in inspector.get_foreign_keys(table)}
        unique = {tuple(key["column_names"]) for key in inspector.get_unique_constraints(table)}
        indexes = {
            index["name"]: (
                tuple(index.get("expressions") or index["column_names"]),
                index["unique"],
                str(index.get("dialect_options")),
                str(index.get("column_sorting")),
            )
            for index in inspector.get_indexes(table)
        }
        facts[table] = (columns, inspector.get_pk_constraint(table)["constrained_columns"], keys, unique, indexes)
    return facts


async def test_up_from_empty_gives_the_schema(empty_database):
    await migrate.upgrade(empty_database)
    engine = create_engine(empty_database)
    async with engine.connect() as conn:
        assert await conn.run_sync(_differences) == []
    await engine.dispose()
    assert await migrate.current(empty_database) == migrate.HEAD


async def test_schema_makes_the_same_tables_as_the_migrations(database, postgres, empty_database):
    """The other way round: tables made from the schema have the same columns, keys and indexes, to the letter."""
    facts = []
    for url, create in ((database, False), (empty_database, True)):
        engine = create_engine(url)
        async with engine.begin() as conn:
            if create:
                await conn.run_sync(metadata.create_all)
            facts.append(await conn.run_sync(_column_facts))
        await engine.dispose()
    assert facts[0] == facts[1]


async def test_up_is_harmless_when_there_is_nothing_to_do(database):
    await migrate.upgrade(database)
    assert await migrate.current(database) == migrate.HEAD


def test_head_is_the_newest_revision():
    assert ScriptDirectory.from_config(migrate.config_for()).get_heads() == [migrate.HEAD]


async def test_current_of_an_empty_database_is_none(empty_database):
    assert await migrate.current(empty_database) is None


async def _fill_first_revision(url: str, at: datetime) -> None:
    engine = create_engine(url)
    tenant, job = new_id(), new_id()
    async with engine.begin() as conn:
        await conn.execute(insert(tenants).values(id=tenant, path="default"))
        await conn.execute(
            insert(jobs).values(
                id=job,
                tenant_id=tenant,
                name="a",
                spec={},
                created_by="x",
                received_at=at,
                submitted_at=at,
                queued_at=at,
            )
        )
        rows = [
            {
                "job_id": job,
                "attempt_id": job,
                "rank": 0,
                "name": "loss",
                "step": n,
                "value": 1.0 / (n + 1),
                "at": at - timedelta(hours=7 * n),
            }
            for n in range(20)
        ]
        await conn.execute(insert(metrics), rows)
    await engine.dispose()


async def test_up_from_the_first_revision_keeps_the_data(empty_database):
    at = datetime.now(UTC)
    await migrate.upgrade(empty_database, "0001")
    await _fill_first_revision(empty_database, at)
    await migrate.upgrade(empty_database)
    engine = create_engine(empty_database)
    async with engine.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(jobs)) == 1
        assert await conn.scalar(select(func.count()).select_from(metrics)) == 20
        today = await conn.scalar(text(f"SELECT count(*) FROM metrics_{at:%Y%m%d}"))
        assert 1 <= today < 20
        assert await conn.run_sync(_differences) == []
    await engine.dispose()


async def test_down_to_the_first_revision_keeps_the_data_and_down_to_base_leaves_nothing(empty_database):
    await migrate.upgrade(empty_database)
    await _fill_first_revision(empty_database, datetime.now(UTC))
    await migrate.downgrade(empty_database, "0001")
    engine = create_engine(empty_database)
    async with engine.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(metrics)) == 20
    await migrate.downgrade(empty_database, "base")
    async with engine.connect() as conn:
        left = await conn.run_sync(lambda sync: set(inspect(sync).get_table_names()))
        functions = await conn.scalar(text("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"))
    await engine.dispose()
    assert left <= set(IGNORED)
    assert functions == 0
    await migrate.upgrade(empty_database)


# ------------------------------------------------------------------ while servers run


WAITS_S = 20.0
BUILT = ("jobs_elastic", "jobs_ran", "jobs_tried")
_VALID = text("SELECT relname, indisvalid FROM pg_index JOIN pg_class ON oid = indexrelid WHERE relname = ANY(:names)")
_SOMEBODY_WAITS = text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")


async def _submit(conn, *, state="queued", attempts=0):
    """A job, written as a server would; its id."""
    at, tenant, job = datetime.now(UTC), new_id(), new_id()
    await conn.execute(insert(tenants).values(id=tenant, path=tenant.hex))
    values = {"received_at": at, "submitted_at": at, "queued_at": at, "state": state, "attempts": attempts}
    await conn.execute(insert(jobs).values(id=job, tenant_id=tenant, name="a", spec={}, created_by="x", **values))
    return job


async def _built(engine):
    async with engine.connect() as conn:
        return {row.relname: row.indisvalid for row in await conn.execute(_VALID, {"names": list(BUILT)})}


@pytest.fixture
async def old(empty_database):
    """An engine on a database as it was before 0011, with rows."""
    await migrate.upgrade(empty_database, "0010")
    await _fill_first_revision(empty_database, datetime.now(UTC))
    engine = create_engine(empty_database)
    yield engine
    await engine.dispose()


async def test_jobs_are_submitted_while_their_indexes_are_built(old, empty_database):
    """A build waits for a transaction that has written to the table; nobody who comes after waits for the build."""
    async with old.begin() as first:
        await _submit(first)
        upgrade = asyncio.ensure_future(migrate.upgrade(empty_database))
        async with asyncio.timeout(WAITS_S), old.connect() as conn:
            while not await conn.scalar(_SOMEBODY_WAITS):
                assert not upgrade.done()
                await conn.rollback()
                await asyncio.sleep(0.02)
        async with old.begin() as second:
            await second.execute(text("SET LOCAL lock_timeout = '2s'"))
            await _submit(second)
    await upgrade
    assert await _built(old) == dict.fromkeys(BUILT, True)
    async with old.connect() as conn:
        assert await conn.scalar(select(func.count()).select_from(jobs)) == 3


@pytest.mark.parametrize("valid", [False, True])
async def test_what_an_interrupted_upgrade_left_of_an_index_is_built_anew_or_used(old, empty_database, valid):
    async with old.begin() as conn:
        await conn.execute(text("CREATE INDEX jobs_tried ON jobs (id) WHERE state = 'queued' AND attempts > 0"))
        left = await conn.scalar(text("SELECT CAST(to_regclass('jobs_tried') AS bigint)"))
        await conn.execute(
            text("UPDATE pg_index SET indisvalid = :valid WHERE indexrelid = :left"), {"valid": valid, "left": left}
        )
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        now = await conn.scalar(text("SELECT CAST(to_regclass('jobs_tried') AS bigint)"))
        assert await conn.run_sync(_differences) == []
    assert await _built(old) == dict.fromkeys(BUILT, True)
    assert (now == left) is valid


async def test_a_revision_that_fails_leaves_nothing_but_its_indexes_and_is_run_again(old, empty_database):
    async with old.begin() as conn:
        await conn.execute(text("CREATE TABLE speeds (in_the_way boolean)"))
    with pytest.raises(Exception, match='"speeds" already exists'):
        await migrate.upgrade(empty_database)
    assert await migrate.current(empty_database) == "0010"
    assert await _built(old) == dict.fromkeys(("jobs_elastic", "jobs_tried"), True)
    async with old.begin() as conn:
        assert await conn.scalar(text("SELECT to_regclass('maintenance') IS NULL"))
        await conn.execute(text("DROP TABLE speeds"))
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        assert await conn.run_sync(_differences) == []


async def test_many_may_upgrade_at_once(old, empty_database):
    async with asyncio.timeout(WAITS_S):
        await asyncio.gather(*(migrate.upgrade(empty_database) for _ in range(4)))
    assert await migrate.current(empty_database) == migrate.HEAD
    assert await _built(old) == dict.fromkeys(BUILT, True)


async def test_what_waiting_jobs_were_first_told_is_kept_through_the_upgrade(old, empty_database):
    """Of a job that never ran it is known; of one that waits again, what it is told now is the first that is known."""
    first, later = datetime(2030, 1, 1, tzinfo=UTC), datetime(2030, 1, 2, tzinfo=UTC)
    async with old.begin() as conn:
        new, again, untold = await _submit(conn), await _submit(conn, attempts=1), await _submit(conn)
        for job, estimate in ((new, later), (again, later), (untold, None)):
            hold = {"job": job, "at": first, "estimate": estimate, "low": estimate}
            await conn.execute(
                text(
                    "INSERT INTO holds (job_id, reason, message, unblocks, since, estimated_start, estimated_start_low)"
                    " VALUES (:job, 'capacity', '', '[]', :at, :estimate, :low)"
                ),
                hold,
            )
        for job in (new, again):
            said = {"job": job, "at": first}
            await conn.execute(
                text("INSERT INTO forecasts (job_id, said_at, start, start_low) VALUES (:job, :at, :at, :at)"), said
            )
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        rows = {row.job_id: (row.first_start, row.first_start_low) for row in await conn.execute(select(holds))}
    assert rows == {new: (first, first), again: (later, later), untold: (None, None)}


async def test_what_waiting_jobs_were_first_told_is_filled_in_batch_by_batch(old, empty_database, monkeypatch):
    monkeypatch.setattr(migrate, "BATCH_ROWS", 2)
    at = datetime(2030, 1, 1, tzinfo=UTC)
    async with old.begin() as conn:
        waiting = [{"job": await _submit(conn), "at": at} for _ in range(5)]
        await conn.execute(
            text(
                "INSERT INTO holds (job_id, reason, message, unblocks, since, estimated_start)"
                " VALUES (:job, 'capacity', '', '[]', :at, :at)"
            ),
            waiting,
        )
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        assert (await conn.execute(select(holds.c.first_start))).scalars().all() == [at] * 5


async def _add_attempts(conn, *ended_at):
    """A job with attempts that ended then; its id and theirs."""
    job, cluster = await _submit(conn), new_id()
    await conn.execute(insert(clusters).values(id=cluster, name="a"))
    given = {"job_id": job, "cluster_id": cluster, "gpu_type": "h100", "replicas": 1, "state": "ended"}
    rows = [
        given
        | {"id": new_id(), "number": number, "epoch": number, "outcome": "failed", "created_at": at, "ended_at": at}
        for number, at in enumerate(ended_at, 1)
    ]
    await conn.execute(insert(attempts), rows)
    return job, [row["id"] for row in rows]


async def test_what_attempts_said_of_their_steps_is_read_from_their_metrics(old, empty_database):
    await migrate.upgrade(empty_database, "0014")
    at = datetime.now(UTC) - timedelta(minutes=9)
    async with old.begin() as conn:
        job, (trained, _) = await _add_attempts(conn, at, at)
        said = [(0, "loss", 3, 5.0), (1, "loss", 4, 4.0), (2, "productive_s", 4, 8.0), (3, "loss", 6, 3.0)]
        of_rank = {"job_id": job, "attempt_id": trained, "rank": 0}
        rows = [
            of_rank | {"name": name, "step": step, "value": value, "at": at + timedelta(minutes=minute)}
            for minute, name, step, value in said
        ]
        await conn.execute(insert(metrics), [*rows, {**rows[0], "rank": 1, "step": 1}])
        await conn.execute(insert(progress).values(job_id=job, attempt_id=trained, values={"loss": 3, "acc": 1}, at=at))
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        (row,) = await conn.execute(select(attempt_steps))
    minutes = timedelta(minutes=3)
    assert row == (trained, True, 3, at, 6, at + minutes, {"productive_s": 8.0})


_FAILS_ONCE = """
CREATE SEQUENCE read_of_attempts;
CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('read_of_attempts') = 2 THEN RAISE 'cut off'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER fail_once BEFORE INSERT ON attempt_steps FOR EACH ROW EXECUTE FUNCTION fail_once();
"""


async def test_what_was_read_of_attempts_before_an_upgrade_was_cut_off_is_not_read_again(
    old, empty_database, monkeypatch
):
    monkeypatch.setattr(migrate, "BATCH_ROWS", 1)
    await migrate.upgrade(empty_database, "0014")
    at, revision = datetime.now(UTC), ScriptDirectory.from_config(migrate.config_for()).get_revision("0015")
    async with old.begin() as conn:
        job, (*recent, _) = await _add_attempts(conn, at, at, at, at - timedelta(days=99))
        points = [{"attempt_id": attempt, "rank": 0, "name": "loss", "step": 1, "value": 1.0} for attempt in recent]
        await conn.execute(insert(metrics), [point | {"job_id": job, "at": at} for point in points])
        for script in (revision.module.UP, _FAILS_ONCE):
            await conn.run_sync(migrate.run_script, script)
        to_fill = text(f"SELECT id FROM attempts WHERE {revision.module.TO_FILL}")
        assert set((await conn.scalars(to_fill)).all()) == {*recent}
    with pytest.raises(Exception, match="cut off"):
        await migrate.upgrade(empty_database)
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        assert set((await conn.scalars(select(attempt_steps.c.attempt_id))).all()) == set(recent)
        assert await conn.scalar(text("SELECT last_value FROM read_of_attempts")) == 1 + 1 + 2


@pytest.fixture
def impatient(monkeypatch):
    """One try, which waits for a lock only a moment."""
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(migrate, "BUILD_TIMEOUT_S", 1.0)
    monkeypatch.setattr(migrate, "PAUSE_S", 0.0)
    monkeypatch.setattr(migrate, "PATIENCE_S", 0.0)


# Of 0012 that alters a table in its transaction; of 0014 that refers to one in it.
@pytest.mark.parametrize(("table", "reached"), [("holds", "0011"), ("attempts", "0013")])
async def test_a_migration_gives_up_on_a_lock_in_time_and_says_who_has_it(
    old, empty_database, impatient, table, reached
):
    async with old.begin() as conn:
        pid = await conn.scalar(text("SELECT pg_backend_pid()"))
        await conn.execute(text(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE"))
        said = rf"phalanx \(.*, pid {pid}, idle in transaction\) has locked {table} for .* `LOCK TABLE {table} IN .*"
        advice = rf"pg_terminate_backend\({pid}\), and run it again: what is done is kept"
        with pytest.raises(migrate.MigrationBlocked, match=f"{said}{advice}"):
            await migrate.upgrade(empty_database)
        assert await migrate.current(empty_database) == reached
        async with old.begin() as other:
            assert not await other.scalar(_SOMEBODY_WAITS)
            assert await other.scalar(text("SELECT to_regclass('profiles') IS NULL"))
    await migrate.upgrade(empty_database)
    async with old.connect() as conn:
        assert await conn.run_sync(_differences) == []


async def test_who_keeps_an_index_from_being_built_is_named_and_it_is_built_anew(old, empty_database, impatient):
    """A transaction that has written to the table, though it has no lock that others wait for."""
    async with old.begin() as conn:
        pid = await conn.scalar(text("SELECT pg_backend_pid()"))
        await _submit(conn)
        said = rf"pid {pid}, idle in transaction\) has a transaction open for .*what is done is kept"
        with pytest.raises(migrate.MigrationBlocked, match=said):
            await migrate.upgrade(empty_database)
    assert False in (await _built(old)).values()
    await migrate.upgrade(empty_database)
    assert await _built(old) == dict.fromkeys(BUILT, True)


async def test_who_is_blamed_is_who_is_waited_for_not_who_has_any_lock_for_longer(old, empty_database, impatient):
    async with old.begin() as innocent:
        await innocent.execute(text("LOCK TABLE tenants IN SHARE UPDATE EXCLUSIVE MODE"))
        async with old.begin() as conn:
            pid = await conn.scalar(text("SELECT pg_backend_pid()"))
            await conn.execute(text("LOCK TABLE holds IN ACCESS SHARE MODE"))
            with pytest.raises(migrate.MigrationBlocked, match=rf"pid {pid}, .* has locked holds"):
                await migrate.upgrade(empty_database)


async def test_who_is_in_the_way_is_named_to_a_role_that_may_not_see_what_others_do(old, empty_database, impatient):
    async with old.begin() as conn:
        await conn.execute(text("CREATE ROLE migrator LOGIN"))
        for table in (await conn.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))).all():
            await conn.execute(text(f"ALTER TABLE {table} OWNER TO migrator"))
        await conn.execute(text("GRANT ALL ON SCHEMA public TO migrator"))
    try:
        async with old.begin() as conn:
            pid = await conn.scalar(text("SELECT pg_backend_pid()"))
            await conn.execute(text("LOCK TABLE holds IN ACCESS SHARE MODE"))
            said = rf"pid {pid}\) has locked holds, for how long and with what only pg_read_all_stats may see: .*{pid}"
            with pytest.raises(migrate.MigrationBlocked, match=said):
                await migrate.upgrade(make_url(empty_database).set(username="migrator").render_as_string(False))
    finally:
        async with old.begin() as conn:
            await conn.execute(text("REASSIGN OWNED BY migrator TO CURRENT_USER"))
            await conn.execute(text("DROP OWNED BY migrator"))
            await conn.execute(text("DROP ROLE migrator"))


async def test_what_a_migration_did_before_it_met_a_lock_does_not_count_against_its_patience(
    old, empty_database, impatient, monkeypatch
):
    monkeypatch.setattr(migrate, "PATIENCE_S", 1.2)  # more than one wait, less than this try
    run, tries = migrate._run, []

    async def long_at_work(*given):
        tries.append(1)
        if len(tries) == 1:
            await asyncio.sleep(1.0)
        else:
            await holder.rollback()
        await run(*given)

    monkeypatch.setattr(migrate, "_run", long_at_work)
    async with old.connect() as holder:
        await holder.execute(text("LOCK TABLE holds IN ACCESS SHARE MODE"))
        await migrate.upgrade(empty_database)
    assert len(tries) == 2


async def test_a_migration_that_met_a_lock_is_tried_again_by_itself(old, empty_database, impatient, monkeypatch):
    monkeypatch.setattr(migrate, "PATIENCE_S", WAITS_S)
    run, tries = migrate._run, []

    async def counted(*given):
        tries.append(1)
        if len(tries) == 3:
            await holder.rollback()
        await run(*given)

    monkeypatch.setattr(migrate, "_run", counted)
    async with old.connect() as holder:
        await holder.execute(text("LOCK TABLE holds IN ACCESS SHARE MODE"))
        await migrate.upgrade(empty_database)
    assert len(tries) == 3
    assert await migrate.current(empty_database) == migrate.HEAD


@pytest.fixture
async def series(engine):
    """Metrics at three days, all before their partition was made."""
    job = new_id()
    start = datetime(2031, 3, 4, 12, tzinfo=UTC)
    async with engine.begin() as conn:
        rows = [
            {"job_id": job, "attempt_id": job, "rank": 0, "name": "loss", "value": 1.0, "at": start + timedelta(days=n)}
            for n in range(3)
        ]
        await conn.execute(insert(metrics), rows)
    return start


async def test_rows_in_the_rest_move_to_the_partition_that_is_made_for_them(engine, series):
    until = series + timedelta(days=1)
    async with engine.begin() as conn:
        made = await conn.scalar(text("SELECT ensure_partitions(:a, :b)"), {"a": series, "b": until})
        again = await conn.scalar(text("SELECT ensure_partitions(:a, :b)"), {"a": series, "b": until})
        rest = await conn.scalar(text("SELECT count(*) FROM metrics_rest"))
        everything = await conn.scalar(select(func.count()).select_from(metrics))
    assert (made, again, rest, everything) == (3, 0, 1, 3)


async def test_old_partitions_are_dropped_whole_and_the_rest_is_swept(engine, series):
    async with engine.begin() as conn:
        await conn.execute(text("SELECT ensure_partitions(:a, :a)"), {"a": series})
        before = series + timedelta(days=1, hours=13)
        await conn.execute(text("SELECT drop_partitions('metrics', 'at', :before)"), {"before": before})
        gone = await conn.scalar(text(f"SELECT to_regclass('metrics_{series:%Y%m%d}') IS NULL"))
        left = (await conn.execute(select(metrics.c.at))).scalars().all()
    assert gone
    assert left == [series + timedelta(days=2)]
