"""A world for the API's tests: tenants, tokens of every role, a cluster with two nodes; the application in process.

Rows are written straight into the database, so that a test of a route depends on that route alone.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.main import configure_logging, create_app
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store.engine import create_engine
from phalanx_server.store.schema import attempts, clusters, jobs, nodes, placements, quotas, tenants
from phalanx_server.store.tokens import TokenRow, insert_token, mint
from sqlalchemy import Table, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

TENANTS = ("default", "research", "research/nlp", "vision")
GIB = 1 << 30


@dataclass
class World:
    """Ids and token texts by the name that tests use."""

    engine: AsyncEngine
    tenants: dict[str, UUID] = field(default_factory=dict)
    nodes: dict[str, UUID] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, UUID] = field(default_factory=dict)
    cluster: UUID = field(default_factory=ids.new_id)

    async def add_token(self, conn: AsyncConnection, name: str, role: str, **scope: Any) -> None:
        minted = mint()
        kind = role if role in ("cluster", "node") else "user"
        await insert_token(conn, minted, TokenRow(kind=kind, role=role, name=name, **scope))
        self.tokens[name], self.token_ids[name] = minted.text, minted.id

    async def place(self, job: str) -> str:
        """Let the first attempt of a job start on n0; its id."""
        attempt, job_id = ids.new_id(), ids.parse("job", job)
        async with self.engine.begin() as conn:
            given = {"cluster_id": self.cluster, "number": 1, "epoch": 1, "gpu_type": "h100", "replicas": 1}
            await conn.execute(insert(attempts).values(id=attempt, job_id=job_id, created_at=func.now(), **given))
            await conn.execute(update(jobs).where(jobs.c.id == job_id).values(epoch=1))
            group = {"group_rank": 0, "replicas": 1, "gpu_indices": [0], "first_rank": 0, "ranks": 1}
            place = {"attempt_id": attempt, "node_id": self.nodes["n0"], "cpus": 0, "memory_bytes": 0}
            await conn.execute(insert(placements).values(**place, **group))
        return ids.encode("attempt", attempt)

    async def silence(self, node: str) -> None:
        """Let a node be silent for so long that it will be given up."""
        past = datetime.now(UTC) - timedelta(hours=1)
        async with self.engine.begin() as conn:
            await conn.execute(update(nodes).where(nodes.c.id == self.nodes[node]).values(runner_seen_at=past))

    async def silent_s(self, node: str) -> float:
        query = select(nodes.c.runner_seen_at).where(nodes.c.id == self.nodes[node])
        async with self.engine.connect() as conn:
            return (datetime.now(UTC) - (await conn.execute(query)).scalar_one()).total_seconds()

    async def count(self, *tables: Table) -> int:
        """Rows of all these together."""
        async with self.engine.connect() as conn:
            return sum([(await conn.execute(select(func.count()).select_from(each))).scalar_one() for each in tables])


async def populate(world: World) -> None:
    async with world.engine.begin() as conn:
        for path in TENANTS:
            world.tenants[path] = ids.new_id()
            parent = world.tenants.get(path.rpartition("/")[0])
            await conn.execute(insert(tenants).values(id=world.tenants[path], path=path, parent_id=parent))
        await conn.execute(insert(quotas).values(tenant_id=world.tenants["research"], resource="h100", nominal=8))
        await conn.execute(insert(clusters).values(id=world.cluster, name="main"))
        for name in ("n0", "n1"):
            world.nodes[name] = ids.new_id()
            await conn.execute(insert(nodes).values(**node_row(world, name)))
        nlp, vision = world.tenants["research/nlp"], world.tenants["vision"]
        await world.add_token(conn, "admin", "admin")
        await world.add_token(conn, "operator", "operator")
        await world.add_token(conn, "manager", "manager", tenant_id=world.tenants["research"])
        await world.add_token(conn, "alice", "member", tenant_id=nlp)
        await world.add_token(conn, "bob", "member", tenant_id=vision)
        await world.add_token(conn, "viewer", "viewer", tenant_id=nlp)
        await world.add_token(conn, "agent", "cluster", cluster_id=world.cluster)
        await world.add_token(conn, "n0", "node", cluster_id=world.cluster, node_id=world.nodes["n0"])
        past = datetime.now(UTC) - timedelta(hours=1)
        await world.add_token(conn, "expired", "member", tenant_id=nlp, expires_at=past)


def node_row(world: World, name: str) -> dict[str, Any]:
    return {
        "id": world.nodes[name],
        "cluster_id": world.cluster,
        "name": name,
        "ray_node_id": f"ray-{name}",
        "gpu_type": "h100",
        "gpus": 8,
        "cpus": 64,
        "memory_bytes": 512 * GIB,
        "address": "10.0.0.1",
    }


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    world = World(create_engine(database, pool_size=4))
    await populate(world)
    yield world
    await world.engine.dispose()


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    chosen = {"database_url": database, "data_dir": tmp_path, "port": 0, "token_cache_s": 0, "log_level": "warning"}
    settings = Settings.model_validate(chosen | {"database_pool": 6, "max_bundle_bytes": 4 << 20})
    configure_logging(settings)
    return settings


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[FastAPI]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield app


Calls = Callable[[str], httpx.AsyncClient]


@pytest.fixture
async def calls(app: FastAPI, world: World) -> AsyncIterator[Calls]:
    """`calls("alice")` is a client with alice's token; `calls("")` has none."""
    made: list[httpx.AsyncClient] = []

    def client(name: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {world.tokens[name]}"} if name else {}
        transport = httpx.ASGITransport(app=app)
        made.append(httpx.AsyncClient(transport=transport, base_url="http://phalanx", headers=headers))
        return made[-1]

    yield client
    for each in made:
        await each.aclose()


@pytest.fixture
async def admin(calls: Calls) -> httpx.AsyncClient:
    return calls("admin")


@pytest.fixture
async def alice(calls: Calls) -> httpx.AsyncClient:
    """A member of research/nlp."""
    return calls("alice")


@pytest.fixture
async def bob(calls: Calls) -> httpx.AsyncClient:
    """A member of vision."""
    return calls("bob")


@dataclass(frozen=True)
class SmallDisk:
    """A disk of its own at `path`, small enough to fill."""

    path: Path

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    def empty(self) -> None:
        """Take away what `fill` put there."""
        (self.path / "ballast").unlink()


@contextmanager
def mounted(path: Path, *, size_bytes: int) -> Iterator[SmallDisk]:
    """An empty disk. Skips the test where none may be mounted: only root may."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "phalanx-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a disk to fill")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


MountDisk = Callable[[Path, int], SmallDisk]


@pytest.fixture
def mount_disk() -> Iterator[MountDisk]:
    """`mount_disk(path, size_bytes)` is a disk until the end of the test."""
    with ExitStack() as stack:
        yield lambda path, size_bytes: stack.enter_context(mounted(path, size_bytes=size_bytes))


JobFile = Callable[..., dict[str, Any]]


@pytest.fixture
def job_file() -> JobFile:
    """`job_file(name="x")` is a small job that is valid as it is, with these fields instead of its own."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "name": "train",
            "tenant": "research/nlp",
            "resources": {"replicas": 2, "gpus_per_replica": 4},
            "run": {"command": "python train.py"},
        } | changes

    return make
