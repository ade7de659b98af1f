"""More requests than can be served: who is refused, how, and that nodes, agents and probes are not among them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.api import stalls
from phalanx_server.api.admission import AdmissionMiddleware, Bounds, Gate
from phalanx_server.api.errors import Problem
from phalanx_server.settings import Settings
from phalanx_server.store.engine import driver_dsn

WAITING = 10
BEAT = {"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": True}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_waiting_requests": WAITING, "max_streams": 2})


@pytest.fixture
async def held_up(app: FastAPI, world: Any, database: str) -> AsyncIterator[asyncio.Event]:
    """Whatever looks at jobs waits, until the event is set."""
    connection, release = await asyncpg.connect(driver_dsn(database)), asyncio.Event()
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")

    async def let_go() -> None:
        await release.wait()
        await transaction.rollback()

    task = asyncio.create_task(let_go())
    yield release
    release.set()
    await task
    await connection.close()


def gates_of(app: FastAPI) -> Any:
    """Of the application as it is served."""
    layer: Any = app.middleware_stack
    while not isinstance(layer, AdmissionMiddleware):
        layer = layer.app
    return layer.gates


async def flood(client: httpx.AsyncClient, count: int) -> list[asyncio.Task[httpx.Response]]:
    tasks = [asyncio.create_task(client.get("/v1/jobs")) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_a_flood_of_users_is_refused_at_once_and_keeps_nobody_else_waiting(
    app: FastAPI, calls: Any, held_up: asyncio.Event
) -> None:
    assert (await calls("").get("/healthz")).status_code == 200  # the stack of middlewares is there now
    users = gates_of(app).users
    room, share = users.bounds.running + WAITING, users.bounds.per_caller
    assert share == room // 2
    floods = [await flood(calls(name), 2 * share) for name in ("alice", "bob")]
    refused: list[httpx.Response] = []
    async with asyncio.timeout(5):
        while len(refused) < 2 * share:
            done = [task for tasks in floods for task in tasks if task.done()]
            refused = [task.result() for task in done]
            await asyncio.sleep(0.01)
    assert Counter(answer.status_code for answer in refused) == {429: 2 * share}
    assert refused[0].json()["code"] == "rate_limited" and refused[0].headers["retry-after"] == "2"
    assert (users.running, users.waiting) == (users.bounds.running, WAITING)
    third = await calls("viewer").get("/v1/jobs")
    assert (third.status_code, third.json()["code"], third.headers["retry-after"]) == (503, "overloaded", "2")
    async with asyncio.timeout(5):
        report = {"boot": "b", "seq": 1, "sent_at": 0.0, "heartbeat": BEAT}
        assert (await calls("n0").post("/v1/node/reports", json=report)).status_code == 200
        inventory = {"instance": "a", "sent_at": 0.0, "nodes": [], "without_token": []}
        assert (await calls("agent").put("/v1/agent/nodes", json=inventory)).status_code == 200
        assert (await calls("").get("/healthz")).status_code == 200
        assert (await calls("").get("/readyz")).status_code == 200
    held_up.set()
    answers = [await task for tasks in floods for task in tasks]
    assert Counter(answer.status_code for answer in answers) == {200: room, 429: 2 * share}
    assert (users.running, users.waiting) == (0, 0)
    assert (await calls("alice").get("/v1/jobs")).status_code == 200


async def test_streams_have_a_bound_and_leave_their_gate(
    app: FastAPI, calls: Any, alice: httpx.AsyncClient, job_file: Any
) -> None:
    job = (await alice.post("/v1/jobs", json=job_file())).json()["id"]
    measures = app.state.services.measures
    follow = f"/v1/jobs/{job}/events?follow=true"
    streams = [asyncio.create_task(calls("alice").get(follow)) for _ in range(2)]
    async with asyncio.timeout(5):
        while measures.streams < 2:  # noqa: ASYNC110 - they open without a word
            await asyncio.sleep(0.01)
    assert gates_of(app).users.running == 0
    refused = await alice.get(follow)
    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "overloaded", "2")
    assert (await alice.post(f"/v1/jobs/{job}/cancel")).is_success
    for stream in streams:
        assert (await stream).text.count("event: end") == 1
    assert measures.streams == 0
    assert (await alice.get(follow)).status_code == 200


@pytest.mark.parametrize(
    ("name", "method", "path", "gate"),
    [
        ("n0", "POST", "/v1/node/reports", "reports"),
        ("agent", "POST", "/v1/agent/reports", "reports"),
        ("alice", "POST", "/v1/jobs", "submits"),
        ("alice", "PUT", f"/v1/bundles/{'0' * 64}", "transfers"),
    ],
)
async def test_who_goes_silent_within_a_body_does_not_keep_a_place(
    app: FastAPI, calls: Any, monkeypatch: pytest.MonkeyPatch, name: str, method: str, path: str, gate: str
) -> None:
    """A node without power, a laptop that was closed: no connection tells that they will never send the rest."""
    monkeypatch.setattr(stalls, "STALLED_S", 0.1)

    async def silent() -> AsyncIterator[bytes]:
        yield b'{"boot": "b", '
        await asyncio.Event().wait()

    headers = {"Content-Type": "application/json", "Content-Length": "1000"}
    async with asyncio.timeout(10):
        answer = await calls(name).request(method, path, content=silent(), headers=headers)
    assert answer.status_code == 408 and answer.headers["connection"] == "close"
    assert getattr(gates_of(app), gate).running == 0


# ------------------------------------------------------------------ a gate


async def code_of(gate: Gate, caller: bytes = b"a") -> str:
    try:
        await gate.enter(caller)
    except Problem as problem:
        return problem.code
    return "in"


async def test_who_waits_too_long_is_told_and_the_next_gets_the_place() -> None:
    gate = Gate("users", Bounds(running=1, waiting=2, patience_s=0.02))
    assert await code_of(gate) == "in"
    assert await code_of(gate) == "overloaded"
    waiting = asyncio.create_task(code_of(gate))
    await asyncio.sleep(0)
    gate.leave(b"a")
    assert await waiting == "in"
    gate.leave(b"a")
    assert (gate.running, gate.waiting, gate._of_caller) == (0, 0, Counter())


async def test_whoever_goes_away_while_waiting_leaves_nothing_behind() -> None:
    gate = Gate("users", Bounds(running=1, waiting=3))
    await gate.enter(b"a")
    first, second, third = (asyncio.create_task(code_of(gate)) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    gate.leave(b"a")  # the place is the first one's, who is gone
    second.cancel()
    await asyncio.wait([first, second])
    assert await third == "in"
    gate.leave(b"a")
    assert (gate.running, gate.waiting, gate._of_caller) == (0, 0, Counter())


async def test_nobody_overtakes() -> None:
    gate, order = Gate("users", Bounds(running=1, waiting=9)), []
    await gate.enter(b"a")

    async def one(number: int) -> None:
        await gate.enter(b"a")
        order.append(number)
        gate.leave(b"a")

    tasks = [asyncio.create_task(one(number)) for number in range(9)]
    await asyncio.sleep(0)
    gate.leave(b"a")
    await asyncio.gather(*tasks)
    assert order == list(range(9))
