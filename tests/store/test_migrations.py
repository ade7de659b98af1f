"""The migrations build what the schema says, keep what is there, and go back."""

from datetime import UTC, datetime, timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from phalanx_server.store import migrate
from phalanx_server.store.engine import create_engine
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import jobs, metadata, metrics, tenants
from sqlalchemy import func, insert, inspect, select, text

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
