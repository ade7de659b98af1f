"""Fixtures for every test: a real PostgreSQL for the session, and a fresh migrated database for each test that asks.

The server is the embedded one with fsync off; a fresh database is a clone of a migrated template (about 40 ms).
"""

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import create_engine, driver_dsn
from phalanx_server.store.migrate import upgrade
from sqlalchemy.ext.asyncio import AsyncEngine

TEMPLATE = "phalanx_template"
TEST_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "autovacuum": "off",
    "io_method": "sync",
    "max_wal_size": "1GB",
}
MEMORY_DISK = Path("/dev/shm")
MEMORY_DISK_BYTES = 4 << 30
_numbers = itertools.count(1)

# The same examples in each run, so that a change is judged by itself; with PHALANX_FUZZ=1 others each time. How fast a
# busy machine draws or tries them is no property of the code.
settings.register_profile(
    "phalanx",
    deadline=None,
    derandomize=not os.environ.get("PHALANX_FUZZ"),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("phalanx")


def has_room(path: Path) -> bool:
    return os.access(path, os.W_OK) and shutil.disk_usage(path).free >= MEMORY_DISK_BYTES


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running PostgreSQL server for the tests alone, in memory where there is room: each test clones a database."""
    directory = Path(tempfile.mkdtemp(prefix="phx-pg-", dir=MEMORY_DISK if has_room(MEMORY_DISK) else None))
    server = EmbeddedPostgres(directory / "data", settings=TEST_SETTINGS)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a migrated, empty database to clone."""

    async def build() -> None:
        await run_sql(postgres, f"CREATE DATABASE {TEMPLATE}")
        await upgrade(postgres.url(TEMPLATE))

    asyncio.run(build())
    return TEMPLATE


async def run_sql(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(driver_dsn(server.url()))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def empty_database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of a database without any table."""
    name = f"empty_{next(_numbers)}"
    await run_sql(postgres, f"CREATE DATABASE {name}")
    yield postgres.url(name)
    await run_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def clone(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    name = f"test_{next(_numbers)}"
    await run_sql(postgres, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield postgres.url(name)
    await run_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """The URL of a fresh database at the newest revision."""
    async with clone(postgres, template) as url:
        yield url


@pytest.fixture
async def other_database(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """The URL of another one."""
    async with clone(postgres, template) as url:
        yield url


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """An engine on a fresh database."""
    engine = create_engine(database, pool_size=8)
    yield engine
    await engine.dispose()
