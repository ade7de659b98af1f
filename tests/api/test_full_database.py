"""The database's disk is full, for real (it lies on a small disk): 503 until there is room, none accepted is lost."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import driver_dsn
from phalanx_server.store.schema import attempts, holds, jobs, metrics
from sqlalchemy.exc import DBAPIError

MIB = 1 << 20
NAME = "on_a_small_disk"


@pytest.fixture
def disk(mount_disk: Any) -> Iterator[Any]:
    place = Path(tempfile.mkdtemp(prefix="phx-disk-"))
    place.chmod(0o755)
    yield mount_disk(
        place / "disk", 64 * MIB
    )  # not in tmp_path: PostgreSQL has a user of its own, who may not go there


@pytest.fixture
async def database(postgres: EmbeddedPostgres, template: str, disk: Any) -> AsyncIterator[str]:
    """The URL of a fresh database that lies on the small disk."""
    assert postgres._user is not None, "as root"
    tablespace = disk.path / "tablespace"
    tablespace.mkdir()
    os.chown(tablespace, postgres._user.pw_uid, postgres._user.pw_gid)
    connection = await asyncpg.connect(driver_dsn(postgres.url()))
    try:
        await connection.execute(f"CREATE TABLESPACE small LOCATION '{tablespace}'")
        await connection.execute(f"CREATE DATABASE {NAME} TEMPLATE {template} STRATEGY file_copy TABLESPACE small")
        yield postgres.url(NAME)
        await connection.execute(f"DROP DATABASE {NAME} WITH (FORCE)")
        await connection.execute("DROP TABLESPACE small")
    finally:
        await connection.close()


async def until_full(client: httpx.AsyncClient, url: str, bodies: Any) -> int:
    """Post until there is no room, which must be said as it should be; how many were taken."""
    for taken, body in enumerate(bodies):
        answer = await client.post(url, json=body)
        if answer.status_code != 201:
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
            assert answer.headers["retry-after"] == "2"
            return taken
    raise AssertionError("the disk is not full")


async def test_all_answer_503_until_there_is_room(
    disk: Any, admin: httpx.AsyncClient, alice: httpx.AsyncClient, calls: Any, job_file: Any, world: Any
) -> None:
    accepted = {(await alice.post("/v1/jobs", json=job_file(name=f"before-{n}"))).json()["id"] for n in range(10)}
    leader = Leader(world.engine, holder="a test", ttl_s=600, renew_s=1)
    loop = ScheduleLoop(world.engine, leader, policy=Policy())
    await leader.tick(datetime.now(UTC))
    disk.fill()
    many = {"jobs": [job_file(name=f"full-{n}") for n in range(500)]}
    key = {"Idempotency-Key": "again"}
    refused = await alice.post("/v1/jobs/batch", json=many, headers=key)
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable"), refused.text
    taken = await until_full(alice, "/v1/jobs", [job_file(name=f"one-{n}") for n in range(500)])
    await until_full(admin, "/v1/tenants", [{"path": f"t{n}"} for n in range(1000)])
    for url in ("/v1/jobs", "/v1/queue", "/v1/nodes", "/readyz", "/metrics"):
        assert (await admin.get(url)).status_code == 200, "what is stored can be read"
    with contextlib.suppress(DBAPIError):
        await loop.tick(datetime.now(UTC))
    disk.empty()
    retried = await alice.post("/v1/jobs/batch", json=many, headers=key)
    assert retried.status_code == 201, retried.text
    assert await world.count(jobs) == len(accepted) + taken + 500
    await loop.tick(datetime.now(UTC))
    await loop.tick(datetime.now(UTC))
    assert await world.count(attempts, holds) > 0, "the scheduler goes on"
    for job in accepted:
        assert (await alice.get(f"/v1/jobs/{job}")).status_code == 200


async def test_a_node_whose_report_finds_no_room_is_heard_and_sends_it_again(
    disk: Any, calls: Any, alice: httpx.AsyncClient, job_file: Any, world: Any
) -> None:
    attempt = await world.place((await alice.post("/v1/jobs", json=job_file())).json()["id"])
    beat = {"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": True}
    part = {"attempt_id": attempt, "epoch": 1, "rank": 0, "at": time.time()}
    points = [part | {"step": step, "values": {"loss": 1.0, "lr": 0.1}} for step in range(5000)]
    report = {"boot": "b", "seq": 1, "sent_at": time.time(), "heartbeat": beat, "metrics": points}
    await world.silence("n0")
    disk.fill()
    refused = await calls("n0").post("/v1/node/reports", json=report)
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable"), refused.text
    assert await world.silent_s("n0") < 60
    disk.empty()
    for _ in range(2):
        assert (await calls("n0").post("/v1/node/reports", json=report)).json()["accepted_seq"] == 1
    assert await world.count(metrics) == 10_000, "all of it, once"
