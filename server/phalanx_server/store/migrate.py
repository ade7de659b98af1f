"""Migrations: brings a database to the schema that this version of the code is written for.

Owns where the Alembic revisions are and how they are run: each in a transaction of its own, so that one may build an
index on a table that servers write to. What an upgrade that was cut off has not done, the next one does. Safe to call
from many processes at once: one migrates, the others wait and find nothing to do.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

import phalanx_server
from phalanx_server.store.engine import with_driver
from phalanx_server.store.transactions import rerun_on_deadlock

HEAD = "0014"
_ADVISORY_LOCK = 7_134_092_251
_ASK_AGAIN_S = 0.1


def migrations_dir() -> Path:
    """The revisions: beside the package in a wheel, at the top of the repository in a checkout."""
    package = Path(phalanx_server.__file__).parent
    candidates = (package / "migrations", package.parent.parent / "migrations")
    for candidate in candidates:
        if (candidate / "env.py").is_file():
            return candidate
    raise RuntimeError(f"no migrations found in {' or '.join(map(str, candidates))}")


@rerun_on_deadlock
async def upgrade(url: str, revision: str = "head") -> None:
    """Migrate the database up to `revision`; once more, if a server that runs was in the way."""
    await _run(url, lambda config: command.upgrade(config, revision))


async def downgrade(url: str, revision: str) -> None:
    """Migrate the database down to `revision` ("base" = empty)."""
    await _run(url, lambda config: command.downgrade(config, revision))


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
    the rest fails. An index that is there stays; what a build that was cut off left of one goes."""
    with context.autocommit_block():
        connection = context.connection
        assert connection is not None
        for name, on in indexes.items():
            valid = connection.scalar(_IS_VALID, {"name": name})
            if valid is False:
                connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {name}")
            if not valid:
                connection.exec_driver_sql(f"CREATE INDEX CONCURRENTLY {name} ON {on}")


async def _run(url: str, operate) -> None:
    engine = _engine(url)
    try:
        async with engine.connect() as conn:
            await _lock(conn)
            await conn.run_sync(lambda sync: operate(config_for(sync)))
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
    return create_async_engine(with_driver(url), poolclass=NullPool)
