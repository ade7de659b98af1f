"""Server-sent events and long polls over a real socket: live, resumed, ended, and cleaned up after."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse
from phalanx_server.main import Server, server_for
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store.logs import LogBatch, LogFiles, LogPiece, index_logs
from phalanx_server.store.metrics import Progress, upsert_progress
from phalanx_server.store.wakeups import notify
from sqlalchemy import text

DEADLINE_S = 20.0


@pytest.fixture
async def server(settings: Settings, world: Any) -> AsyncIterator[Server]:
    server = server_for(settings)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(DEADLINE_S):
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
    await server.config.app.state.services.wakeups.wait_listening(DEADLINE_S)  # type: ignore[union-attr]
    yield server
    server.should_exit = True
    async with asyncio.timeout(DEADLINE_S):
        await task


def port_of(server: Server) -> int:
    return server.servers[0].sockets[0].getsockname()[1]


@pytest.fixture
async def real(server: Server, world: Any) -> AsyncIterator[Any]:
    """`real("alice")` is a client with alice's token over TCP."""
    made: list[httpx.AsyncClient] = []

    def client(name: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {world.tokens[name]}"}
        made.append(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port_of(server)}", headers=headers, timeout=30))
        return made[-1]

    yield client
    for each in made:
        await each.aclose()


@asynccontextmanager
async def following(
    client: httpx.AsyncClient, url: str, **headers: str
) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
    async with asyncio.timeout(DEADLINE_S), aconnect_sse(client, "GET", url, headers=headers) as source:
        assert source.response.status_code == 200
        yield source.aiter_sse()


async def rest(events: AsyncIterator[ServerSentEvent]) -> list[ServerSentEvent]:
    return [event async for event in events]


async def submit(client: httpx.AsyncClient, job_file: Any) -> str:
    return (await client.post("/v1/jobs", json=job_file())).json()["id"]


async def attempt_of(world: Any, job: str) -> tuple[UUID, UUID]:
    """Give a job a running attempt; both ids."""
    job_id, attempt_id = ids.parse("job", job), ids.new_id()
    async with world.engine.begin() as conn:
        await conn.execute(
            text(
                "INSERT INTO attempts (id, job_id, cluster_id, number, epoch, gpu_type, replicas, created_at)"
                " VALUES (:attempt, :job, :cluster, 1, 1, 'h100', 1, now())"
            ),
            {"attempt": attempt_id, "job": job_id, "cluster": world.cluster},
        )
        await conn.execute(
            text("INSERT INTO placements VALUES (:attempt, :node, 0, 1, '{0}', 0, 1, 0, 0)"),
            {"attempt": attempt_id, "node": world.nodes["n0"]},
        )
        await conn.execute(text("UPDATE jobs SET state = 'starting', attempts = 1 WHERE id = :job"), {"job": job_id})
        await notify(conn, f"job:{job_id.hex}", f"desired:{world.cluster.hex}")
    return job_id, attempt_id


async def finish(world: Any, job_id: UUID) -> None:
    async with world.engine.begin() as conn:
        values = {"job": job_id, "now": datetime.now(UTC)}
        await conn.execute(text("UPDATE jobs SET state = 'succeeded', finished_at = :now WHERE id = :job"), values)
        await conn.execute(
            text("INSERT INTO events (job_id, at, kind, message) VALUES (:job, :now, 'succeeded', 'Done.')"), values
        )
        await notify(conn, f"job:{job_id.hex}", f"logs:{job_id.hex}", f"metrics:{job_id.hex}")


# ------------------------------------------------------------------ events


async def test_events_come_live_and_end(real: Any, world: Any, job_file: Any) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    async with following(alice, f"/v1/jobs/{job}/events?follow=true") as events:
        first = await anext(events)
        assert first.event == "event" and json.loads(first.data)["kind"] == "submitted"
        await alice.post(f"/v1/jobs/{job}/hold")
        started = time.monotonic()
        second = await anext(events)
        assert json.loads(second.data)["kind"] == "held" and int(second.id) > int(first.id)
        assert time.monotonic() - started < 1, "woken, not polled"
        await alice.post(f"/v1/jobs/{job}/cancel")
        third, end = await rest(events)
    assert json.loads(third.data)["kind"] == "cancelled"
    assert end.event == "end" and json.loads(end.data) == {"state": "cancelled"}


async def test_events_resume_after_the_last_one_seen(real: Any, job_file: Any) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    for verb in ("hold", "release", "cancel"):
        await alice.post(f"/v1/jobs/{job}/{verb}")
    async with following(alice, f"/v1/jobs/{job}/events", Accept="text/event-stream") as events:
        everything = await rest(events)
    kinds = [json.loads(event.data).get("kind") for event in everything]
    assert kinds == ["submitted", "held", "released", "cancelled", None]
    resume = {"Last-Event-ID": everything[1].id}
    async with following(alice, f"/v1/jobs/{job}/events?follow=true", **resume) as events:
        assert [event.data for event in await rest(events)] == [event.data for event in everything[2:]]
    odd = await alice.get(f"/v1/jobs/{job}/events?follow=true", headers={"Last-Event-ID": "x"})
    assert odd.status_code == 422 and odd.json()["errors"][0]["field"] == "Last-Event-ID"


async def test_an_event_of_an_older_transaction_is_not_skipped(real: Any, world: Any, job_file: Any) -> None:
    """Ids are given before commit: the follower must not pass a gap that an open transaction may still fill."""
    alice = real("alice")
    job = await submit(alice, job_file)
    late = text("INSERT INTO events (job_id, at, kind, message) VALUES (:job, now(), 'note', :says)")
    job_id = ids.parse("job", job)
    async with following(alice, f"/v1/jobs/{job}/events?follow=true") as events:
        await anext(events)
        async with world.engine.connect() as slow:
            await slow.execute(late, {"job": job_id, "says": "slow"})
            async with world.engine.begin() as quick:
                await quick.execute(late, {"job": job_id, "says": "quick"})
                await notify(quick, f"job:{job_id.hex}")
            await asyncio.sleep(0.2)  # the follower looks meanwhile
            await slow.commit()
        both = [json.loads((await anext(events)).data)["message"] for _ in range(2)]
    assert both == ["slow", "quick"]


# ------------------------------------------------------------------ logs


async def write(
    world: Any, settings: Settings, job_id: UUID, attempt_id: UUID, rank: int, start: int, data: bytes
) -> None:
    piece = LogPiece(rank=rank, stream="stdout", start_bytes=start, data=data, at=datetime.now(UTC))
    batch = LogBatch(job_id=job_id, attempt_id=attempt_id, path=f"logs/{ids.new_id().hex}", pieces=[piece])
    await LogFiles(settings.storage_root).write(batch.path, batch.content())
    async with world.engine.begin() as conn:
        await index_logs(conn, batch)
        await notify(conn, f"logs:{job_id.hex}")


async def test_logs_come_live_resume_and_end(real: Any, world: Any, settings: Settings, job_file: Any) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    job_id, attempt_id = await attempt_of(world, job)
    await write(world, settings, job_id, attempt_id, 0, 0, b"one\n")
    async with following(alice, f"/v1/jobs/{job}/logs?follow=true") as events:
        first = await anext(events)
        assert first.event == "log"
        data = json.loads(first.data)
        assert data.pop("at").endswith("Z")
        assert data == {"attempt": 1, "rank": 0, "stream": "stdout", "text": "one\n"}
        await write(world, settings, job_id, attempt_id, 0, 4, "fü".encode()[:-1])  # cut inside a character
        await write(world, settings, job_id, attempt_id, 0, 6, "ü".encode()[1:] + b"nf\n")
        texts = [json.loads((await anext(events)).data)["text"] for _ in range(2)]
        assert texts == ["f", "ünf\n"]
        await finish(world, job_id)
        await write(world, settings, job_id, attempt_id, 1, 0, b"late\n")  # still on its way when the job had ended
        late, end = await rest(events)
    assert json.loads(late.data)["text"] == "late\n"
    assert end.event == "end" and json.loads(end.data) == {"state": "succeeded"}
    resume = {"Last-Event-ID": first.id}
    async with following(alice, f"/v1/jobs/{job}/logs?follow=true&rank=1", **resume) as events:
        assert [(event.id, event.event) for event in await rest(events)] == [(late.id, "log"), (late.id, "end")]


async def test_following_may_begin_with_the_last_lines(
    real: Any, world: Any, settings: Settings, job_file: Any
) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    job_id, attempt_id = await attempt_of(world, job)
    for number in range(5):
        await write(world, settings, job_id, attempt_id, 0, number * 4, b"ab%d\n" % number)
    await finish(world, job_id)
    for lines, texts in ((2, ["ab3\n", "ab4\n"]), (0, [])):
        async with following(alice, f"/v1/jobs/{job}/logs?follow=true&tail_lines={lines}") as events:
            assert [json.loads(event.data)["text"] for event in (await rest(events))[:-1]] == texts


# ------------------------------------------------------------------ metrics


async def test_progress_comes_live_and_ends(real: Any, world: Any, job_file: Any) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    job_id, attempt_id = await attempt_of(world, job)

    async def report(step: int) -> None:
        latest = Progress(at=datetime.now(UTC), step=step, total_steps=9, values={"loss": 1.0 / step, "lr": 0.1})
        async with world.engine.begin() as conn:
            await upsert_progress(conn, job_id=job_id, attempt_id=attempt_id, progress=latest)
            await notify(conn, f"metrics:{job_id.hex}")

    await report(1)
    async with following(alice, f"/v1/jobs/{job}/metrics?follow=true&name=loss") as events:
        first = await anext(events)
        assert first.event == "metrics"
        assert json.loads(first.data) | {"at": 0} == {"step": 1, "total_steps": 9, "values": {"loss": 1.0}, "at": 0}
        await report(2)
        assert json.loads((await anext(events)).data)["step"] == 2
        await finish(world, job_id)
        (end,) = await rest(events)
    assert end.event == "end"


# ------------------------------------------------------------------ long poll, and the end


async def test_desired_is_answered_as_soon_as_it_changes(real: Any, world: Any, job_file: Any) -> None:
    agent, alice = real("agent"), real("alice")
    version = (await agent.get("/v1/agent/desired")).json()["version"]
    poll = asyncio.create_task(agent.get(f"/v1/agent/desired?version={version}&wait_s=20"))
    job = await submit(alice, job_file)
    await asyncio.sleep(0.1)
    assert not poll.done()
    await attempt_of(world, job)
    async with asyncio.timeout(DEADLINE_S / 2):  # less than it would wait for nothing
        answer = await poll
    assert [each["job_id"] for each in answer.json()["attempts"]] == [job]


async def test_a_shutdown_ends_streams_and_polls(real: Any, server: Server, world: Any, job_file: Any) -> None:
    agent, alice = real("agent"), real("alice")
    job = await submit(alice, job_file)
    version = (await agent.get("/v1/agent/desired")).json()["version"]
    poll = asyncio.create_task(agent.get(f"/v1/agent/desired?version={version}&wait_s=20"))
    async with following(alice, f"/v1/jobs/{job}/events?follow=true") as events:
        await anext(events)
        server.begin_shutdown()
        async with asyncio.timeout(DEADLINE_S / 2):  # less than the poll would wait for nothing
            assert (await poll).status_code == 200
            with pytest.raises((StopAsyncIteration, httpx.RemoteProtocolError)):
                await anext(events)


@pytest.mark.parametrize("path", ["events", "logs", "metrics"])
@pytest.mark.parametrize("column", ["revoked_at", "expires_at"])
async def test_a_stream_ends_with_its_token(real: Any, world: Any, job_file: Any, path: str, column: str) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    async with following(alice, f"/v1/jobs/{job}/{path}?follow=true") as events:
        if path == "events":
            await anext(events)
        async with world.engine.begin() as conn:
            change = text(f"UPDATE tokens SET {column} = now() WHERE id = :id")
            await conn.execute(change, {"id": world.token_ids["alice"]})
        assert await rest(events) == [], "the job is not over: there is no `end`"
    assert (await alice.get(f"/v1/jobs/{job}/{path}?follow=true")).status_code == 401


async def test_a_client_that_leaves_is_forgotten(real: Any, server: Server, job_file: Any) -> None:
    alice = real("alice")
    job = await submit(alice, job_file)
    wakeups = server.config.app.state.services.wakeups  # type: ignore[union-attr]
    async with following(alice, f"/v1/jobs/{job}/events?follow=true") as events:
        await anext(events)
        assert wakeups._subscriptions
    async with asyncio.timeout(DEADLINE_S):
        while wakeups._subscriptions:  # noqa: ASYNC110 - the other side of a socket
            await asyncio.sleep(0.02)
