"""Trouble of the database that passes: its connection limit, a lock that is held, sessions that end in the middle.

The server answers 503 with Retry-After everywhere meanwhile, the scheduler's loops go on, and all is well afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import httpx
import pytest
import structlog
from fastapi import FastAPI
from phalanx_server import scheduler_command
from phalanx_server.loops import ticking
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.measures import PassMeasures
from phalanx_server.settings import Settings
from phalanx_server.store import engine as engine_module
from phalanx_server.store import ids
from phalanx_server.store.engine import create_engine, driver_dsn
from phalanx_server.store.schema import attempts, holds
from phalanx_server.store.wakeups import Wakeups
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from sqlalchemy import text

ROLE, CONNECTIONS = "few", 8
RUNNER = {"boot": "b", "seq": 1, "sent_at": 0.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a connection in vain is told sooner."""
    monkeypatch.setattr(engine_module, "POOL_WAIT_S", 2.0)


@pytest.fixture
async def few(database: str) -> AsyncIterator[str]:
    """The URL of the database for a role that may have few connections."""
    connection = await asyncpg.connect(driver_dsn(database))
    try:
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN CONNECTION LIMIT {CONNECTIONS}")
        for what in ("TABLES", "SEQUENCES"):
            await connection.execute(f"GRANT ALL ON ALL {what} IN SCHEMA public TO {ROLE}")
        yield database.replace("//postgres@", f"//{ROLE}@")
        await connection.execute(f"DROP OWNED BY {ROLE}")
        await connection.execute(f"DROP ROLE {ROLE}")
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def taken(url: str) -> AsyncIterator[int]:
    """Take every connection that is left; how many that were."""
    held: list[asyncpg.Connection] = []
    try:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                held.append(await asyncpg.connect(driver_dsn(url)))
        yield len(held)
    finally:
        for connection in held:
            await connection.close()


@pytest.fixture
def settings(settings: Settings, few: str) -> Settings:
    return settings.model_copy(update={"database_url": SecretStr(few), "statement_timeout_s": 2.0})


def expect_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and answer.headers["retry-after"] == "2"
    assert answer.json()["code"] == "unavailable"


async def ask_everything(calls: Any, job_file: Any) -> list[httpx.Response]:
    """Of everybody: a user's reads, writes and streams, an agent's and a runner's calls, a probe."""
    alice, agent, runner = calls("alice"), calls("agent"), calls("n0")
    requests = [
        *(alice.get(f"/v1/{what}") for what in ("jobs", "queue", "nodes", "tenants", "jobs?label=a%3Db")),
        alice.post("/v1/jobs", json=job_file()),
        alice.post("/v1/jobs/batch", json={"jobs": [job_file()]}, headers={"Idempotency-Key": "k"}),
        alice.post("/v1/jobs?dry_run=true", json=job_file()),
        alice.get(f"/v1/jobs/{ids.encode('job', ids.new_id())}/events?follow=true"),
        alice.put(f"/v1/bundles/{'0' * 64}", content=b"\x1f\x8b"),
        agent.get("/v1/agent/desired"),
        agent.post("/v1/agent/reports", json={"instance": "a", "sent_at": 0.0, "facts": []}),
        runner.post("/v1/node/reports", json=RUNNER),
        calls("").get("/readyz"),
        calls("operator").get("/metrics"),
    ]
    return await asyncio.gather(*requests)


async def test_at_the_connection_limit_all_are_told_to_come_back(
    app: FastAPI, calls: Any, few: str, job_file: Any
) -> None:
    alice = calls("alice")
    assert (await alice.post("/v1/jobs", json=job_file())).status_code == 201
    await app.state.services.engine.dispose()
    async with taken(few) as held:
        assert 0 < held < CONNECTIONS
        for answer in await ask_everything(calls, job_file):
            expect_unavailable(answer)
        assert (await calls("").get("/healthz")).status_code == 200
    assert (await alice.post("/v1/jobs", json=job_file())).status_code == 201
    assert (await calls("n0").post("/v1/node/reports", json=RUNNER)).status_code == 200
    assert (await calls("").get("/readyz")).status_code == 200
    assert len((await alice.get("/v1/jobs")).json()["items"]) == 2, "what was accepted, and nothing else"


async def test_the_scheduler_outlives_the_connection_limit(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, few: str, calls: Any, world: Any, job_file: Any
) -> None:
    monkeypatch.setattr(ticking, "PAUSE_AFTER_ERROR_S", 0.01)
    engine = create_engine(few, pool_size=3)
    leader = Leader(engine, holder="a test", ttl_s=600, renew_s=0.01)
    await leader.tick(datetime.now(UTC))
    async with httpx.AsyncClient() as client, Wakeups(few) as wakeups:
        passes = PassMeasures(CollectorRegistry())
        named = scheduler_command._loops(settings, engine, leader, wakeups=wakeups, client=client, passes=passes)
        loops = list(named.by_name.values())
        await engine.dispose()
        with structlog.testing.capture_logs() as said:
            async with taken(few):
                running = [asyncio.create_task(loop.run_forever()) for loop in loops]
                failed: set[str] = set()
                async with asyncio.timeout(20):
                    while len(failed) < len(loops):
                        await asyncio.sleep(0.01)
                        failed = {line["loop"] for line in said if line["event"] == "tick failed"}
            assert not any(task.done() for task in running)
            assert (await calls("alice").post("/v1/jobs", json=job_file())).status_code == 201
            async with asyncio.timeout(20):
                while not await world.count(attempts, holds):  # noqa: ASYNC110 - rows come without a word
                    await asyncio.sleep(0.01)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await engine.dispose()


@contextlib.asynccontextmanager
async def locked(database: str, table: str) -> AsyncIterator[None]:
    """Nobody may even read the table."""
    connection = await asyncpg.connect(driver_dsn(database))
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


async def test_who_waits_too_long_for_a_lock_is_told_to_come_back(database: str, calls: Any, job_file: Any) -> None:
    alice = calls("alice")
    async with locked(database, "jobs"):
        for answer in await asyncio.gather(alice.get("/v1/jobs"), alice.post("/v1/jobs", json=job_file())):
            expect_unavailable(answer)
    assert (await alice.get("/v1/jobs")).status_code == 200


async def test_who_stops_within_a_transaction_keeps_its_locks_for_a_minute_only(database: str) -> None:
    """Whatever the settings of the database: a scheduler that is frozen holds its lease's row: none could follow."""
    engine = create_engine(database)
    query = "SELECT setting, source FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"
    async with engine.connect() as conn:
        assert tuple((await conn.execute(text(query))).one()) == ("60000", "client")
    await engine.dispose()


async def test_sessions_that_end_in_the_middle_are_replaced(
    database: str, calls: Any, job_file: Any, world: Any
) -> None:
    alice = calls("alice")
    requests = [lambda: alice.get("/v1/jobs"), lambda: alice.post("/v1/jobs", json=job_file())] * 2
    end = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        f" WHERE usename = '{ROLE}' AND wait_event_type = 'Lock'"
    )
    async with locked(database, "jobs"):
        waiting = [asyncio.create_task(request()) for request in requests]
        ended = 0
        while not all(task.done() for task in waiting):
            async with world.engine.connect() as conn:
                ended += (await conn.execute(end)).scalar_one()
            await asyncio.sleep(0.01)
        assert ended
        for task in waiting:
            expect_unavailable(task.result())
    for request in requests:
        assert (await request()).is_success
