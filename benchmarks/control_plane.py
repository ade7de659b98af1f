"""A control plane without a cluster: PostgreSQL with durable commits, `phalanx server`, and `phalanx scheduler`.

For what needs no Ray. Owns its processes and their data, in a temporary directory that goes with it.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import driver_dsn
from phalanx_server.supervise import Child, Family, wait_until
from phalanx_server.up_command import prepare_database, reserved_port

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ControlPlane:
    """Where it is, and the tokens to speak to it."""

    url: str
    database_url: str
    token: str
    cluster_token: str

    async def connect(self) -> asyncpg.Connection:
        """Straight to the database, past the server."""
        return await asyncpg.connect(driver_dsn(self.database_url))

    async def sql(self, *statements: str) -> None:
        connection = await self.connect()
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@contextmanager
def control_plane(*, scheduler: bool) -> Iterator[ControlPlane]:
    """Run one. Raises what its parts say when they do not start."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as name:
        data, family = Path(name), Family()
        postgres = EmbeddedPostgres(data / "postgres")
        try:
            database_url = postgres.start()
            tokens: Any = asyncio.run(prepare_database(database_url))
            with reserved_port(HOST, 0) as port:
                url = f"http://{HOST}:{port}"
                plane = ControlPlane(url, database_url, tokens.admin_token, tokens.cluster_token)
                _start(plane, data, family, scheduler=scheduler)
                yield plane
        finally:
            family.stop()
            postgres.stop()


def _start(plane: ControlPlane, data: Path, family: Family, *, scheduler: bool) -> None:
    settings = {"PHALANX_DATABASE_URL": plane.database_url, "PHALANX_DATA_DIR": str(data)}
    env = {**os.environ, **settings}
    port = plane.url.rpartition(":")[2]
    argv = [sys.executable, "-m", "phalanx"]
    server = family.start(Child("server", [*argv, "server", "--port", port], env, data / "server.log"))
    if scheduler:
        family.start(Child("scheduler", [*argv, "scheduler"], env, data / "scheduler.log"))

    def ready() -> bool:
        server.expect_alive()
        try:
            return httpx.get(f"{plane.url}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    wait_until(ready, timeout_s=60, what="the server")
