"""Migrations: brings a database to the schema that this version of the code is written for.

Owns where the Alembic revisions are and how they are run: each in a transaction of its own, so that one may build an
index on a table that servers write to. What an upgrade that was cut off has not done, the next one does. Safe to call
from many processes at once: one migrates, the others wait and find nothing to do.

A statement that waits for the lock of a table keeps all waiting that come after it, so none waits longer than
LOCK_TIMEOUT_S, or BUILD_TIMEOUT_S where an index is built, for which nobody waits: then what the transaction did is
undone, and the revision is tried again after a pause in which the others go on. What was committed is kept, as indexes
and batches of rows are: revisions do it so that they may be run again.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

import phalanx_server
from phalanx_server.store.engine import with_driver

log = structlog.get_logger("phalanx.migrate")

HEAD = "0015"
LOCK_TIMEOUT_S = 2.0  # longer than PostgreSQL takes to find a deadlock (1 s)
BUILD_TIMEOUT_S = 60.0  # a build waits for every transaction that was open before it
PAUSE_S = 5.0  # between tries: most of the time others go on
PATIENCE_S = 300.0  # for all tries; the chart ends the migration's Job after twice as long
BATCH_ROWS = 1000
_ADVISORY_LOCK = 7_134_092_251
_ASK_AGAIN_S = 0.1
_IN_THE_WAY = {"55P03": "waited too long for a lock", "40P01": "was in a deadlock"}  # by SQLSTATE


class MigrationBlocked(TimeoutError):
    """Others were in the way for so long that the migration gave up; what is done is kept, and it may be run again."""


def migrations_dir() -> Path:
    """The revisions: beside the package in a wheel, at the top of the repository in a checkout."""
    package = Path(phalanx_server.__file__).parent
    candidates = (package / "migrations", package.parent.parent / "migrations")
    for candidate in candidates:
        if (candidate / "env.py").is_file():
            return candidate
    raise RuntimeError(f"no migrations found in {' or '.join(map(str, candidates))}")


async def upgrade(url: str, revision: str = "head") -> None:
    """Migrate the database up to `revision`. Raises MigrationBlocked."""
    await _patiently(url, lambda config: command.upgrade(config, revision))


async def downgrade(url: str, revision: str) -> None:
    """Migrate the database down to `revision` ("base" = empty). Raises MigrationBlocked."""
    await _patiently(url, lambda config: command.downgrade(config, revision))


async def current(url: str) -> str | None:
    """The revision that the database is at; None when it is empty."""
    engine = _engine(url)
    try:
        async with engine.connect() as conn:
            return await conn.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    finally:
        await engine.dispose()


def config_for(connection: Connection | None = None) -> Config:
    """An Alembic configuration without any ini file; `connection` is what migrations/env.py runs on."""
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def run_script(connection: Connection, script: str) -> None:
    """Run several SQL statements as one string, which a prepared statement cannot. For revisions only."""
    connection.exec_driver_sql("SELECT 1")  # what goes to the driver alone does not begin the transaction
    driver = connection.connection.driver_connection
    assert driver is not None
    await_only(driver.execute(script))


_IS_VALID = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def build_indexes(context: MigrationContext, indexes: Mapping[str, str]) -> None:
    """Build indexes, each on what its name maps to, on tables that servers write to meanwhile: nobody who writes waits
    for it. For revisions, and first in them: it cannot be in their transaction, and what stands before it is kept if
    the rest fails. An index that is there stays; what a build that was cut off left of one goes. A build waits for
    every transaction that was open before it, for each of them BUILD_TIMEOUT_S at most."""
    with context.autocommit_block():
        connection = context.connection
        assert connection is not None
        connection.exec_driver_sql(f"SET lock_timeout = '{BUILD_TIMEOUT_S}s'")
        for name, on in indexes.items():
            valid = connection.scalar(_IS_VALID, {"name": name})
            if valid is False:
                connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {name}")
            if not valid:
                connection.exec_driver_sql(f"CREATE INDEX CONCURRENTLY {name} ON {on}")
        connection.exec_driver_sql("RESET lock_timeout")


def fill_in_batches(context: MigrationContext, table: str, key: str, *statements: str, where: str = "true") -> None:
    """Run the statements for the rows of a table, a batch of its keys (`:batch`, uuids) at a time, each in a
    transaction of its own, so that servers wait for one batch at most. For revisions, and last in them: what stands
    before it and the batches that are done are kept if the rest fails, and all of the revision is then run again;
    `where` leaves out the rows of `table` that it need not do again."""
    keys = text(f"SELECT {key} FROM {table} WHERE {key} > :after AND {where} ORDER BY {key} LIMIT {BATCH_ROWS}")
    with context.autocommit_block():
        connection = context.connection
        assert connection is not None
        after = UUID(int=0)
        while batch := list(connection.scalars(keys, {"after": after})):
            for statement in statements:
                connection.execute(text(statement), {"batch": batch})
            after = batch[-1]


async def _patiently(url: str, operate: Callable[[Config], None]) -> None:
    """Run it, and again for PATIENCE_S if somebody was in the way; what it did before it met them does not count."""
    tried_s = 0.0
    while True:
        began_at, blockers = time.monotonic(), list[Row[Any]]()
        try:
            return await _run(url, operate, blockers)
        except Exception as error:
            why = _IN_THE_WAY.get(_sqlstate(error))
            if why is None:
                raise
            blocked = f"the migration {why}; {_who(blockers)}"
            tried_s += min(time.monotonic() - began_at, BUILD_TIMEOUT_S) + PAUSE_S
            if tried_s >= PATIENCE_S:
                raise MigrationBlocked(f"{blocked}, and run it again: what is done is kept") from error
        log.warning("a migration is tried again", why=blocked, in_s=PAUSE_S)
        await asyncio.sleep(PAUSE_S)


def _sqlstate(error: Exception) -> str:
    """Of what SQLAlchemy or the driver raised; empty for any other error."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


# Of other roles' sessions a role without pg_read_all_stats sees who they are, and neither state nor query.
_BLOCKERS = text(
    """
    SELECT blocker.pid, a.usename, a.application_name, a.backend_type, a.state, a.query,
           extract(epoch FROM clock_timestamp() - a.xact_start) AS open_s,
           (SELECT c.relname FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
            WHERE l.pid = :pid AND NOT l.granted LIMIT 1) AS relation
    FROM unnest(pg_blocking_pids(:pid)) AS blocker (pid) LEFT JOIN pg_stat_activity a USING (pid)
    WHERE blocker.pid <> pg_backend_pid() AND (blocker.pid = 0 OR a.pid IS NOT NULL)
    ORDER BY a.xact_start LIMIT 1
    """
)


async def _watch(engine: AsyncEngine, pid: int, blockers: list[Row[Any]]) -> None:
    """Note again and again which session that one waits for: once it gives up, nobody can tell. It keeps no transaction
    open, for which an index would wait."""
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        while True:
            blockers += await conn.execute(_BLOCKERS, {"pid": pid})
            del blockers[:-1]
            await asyncio.sleep(LOCK_TIMEOUT_S / 10)


def _who(blockers: Sequence[Row[Any]]) -> str:
    """Who was in the way last, and what can be done about it."""
    if not blockers:
        return "who was in the way is gone: try it"
    (row,) = blockers
    if row.pid == 0:
        return f"a prepared transaction has locked {row.relation}: end it (pg_prepared_xacts has it)"
    state = "" if row.state is None else f", {row.state}"
    user = "" if row.usename is None else f"{row.usename}, "  # an autovacuum is nobody's
    who = f"{row.application_name or row.backend_type or 'a client'} ({user}pid {row.pid}{state})"
    what = "has a transaction open" if row.relation is None else f"has locked {row.relation}"
    last = (
        ", for how long and with what only pg_read_all_stats may see"
        if row.open_s is None
        else f" for {row.open_s:.0f} s, last with `{' '.join(row.query.split())[:100]}`"
    )
    return f"{who} {what}{last}: wait for its end, or end it with SELECT pg_terminate_backend({row.pid})"


async def _run(url: str, operate: Callable[[Config], None], blockers: list[Row[Any]]) -> None:
    """Run it; the last that it waited for is in `blockers`."""
    engine = _engine(url)
    try:
        async with engine.connect() as conn:
            await _lock(conn)
            pid = await conn.scalar(text("SELECT pg_backend_pid()"))
            await conn.commit()
            watching = asyncio.create_task(_watch(engine, pid, blockers))
            try:
                await conn.run_sync(lambda sync: operate(config_for(sync)))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    finally:
        await engine.dispose()


async def _lock(conn: AsyncConnection) -> None:
    """Until the connection ends. It asks again and again: a statement that waits for the lock would be waited for by
    whoever has it and builds an index."""
    while not await conn.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": _ADVISORY_LOCK}):
        await conn.commit()
        await asyncio.sleep(_ASK_AGAIN_S)
    await conn.commit()


def _engine(url: str) -> AsyncEngine:
    settings = {"application_name": "phalanx migrate", "lock_timeout": str(round(LOCK_TIMEOUT_S * 1000))}
    return create_async_engine(with_driver(url), poolclass=NullPool, connect_args={"server_settings": settings})
