"""The smaller duties: time limits, the outbox, retention; and that a loop survives an error."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta

import httpx
import pytest
from control_plane import START, ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.domain.access import SYSTEM
from phalanx_server.loops import deliver_outbox, ticking
from phalanx_server.loops.deliver_outbox import MAX_TRIES, DeliverOutbox
from phalanx_server.loops.retain import AHEAD, BUSY_INTERVAL_S, INTERVAL_S, Keep, Retain
from phalanx_server.loops.ticking import tick_forever
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.outbox import mark_delivered, mark_failed
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.schema import events, holds, idempotency_keys, logs, metrics, outbox
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError

# ------------------------------------------------------------------ outbox


class Receiver:
    """A webhook that answers what a test wants."""

    def __init__(self) -> None:
        self.status = 200
        self.bodies: list[dict] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.status == 0:
            raise httpx.ConnectError("refused")
        self.bodies.append(json.loads(request.content))
        return httpx.Response(self.status)

    def loop(self, plane: ControlPlane, url: str | None = "http://hook.test") -> DeliverOutbox:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self))
        return DeliverOutbox(plane.engine, plane.leader, webhook_url=url, client=client)


async def test_notices_are_posted_in_order_and_once(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    await plane.report(plane.ended(attempt, 0))
    receiver = Receiver()
    loop = receiver.loop(plane)
    assert await loop.tick(plane.now) == 2
    assert await loop.tick(plane.now) == 0
    assert [(body["topic"], body["state"]) for body in receiver.bodies] == [
        ("job.running", "running"),
        ("job.succeeded", "succeeded"),
    ]
    assert receiver.bodies[0]["job_id"] == f"job_{job_id.hex}"


@pytest.mark.parametrize("status", [0, 500])
async def test_a_receiver_that_is_away_is_tried_again_later(plane: ControlPlane, status: int) -> None:
    await plane.add_nodes(1)
    await plane.run()
    receiver = Receiver()
    loop = receiver.loop(plane)
    receiver.status = status
    assert await loop.tick(plane.now) == 0
    receiver.status = 200
    assert await loop.tick(plane.now) == 0
    plane.later(2)
    assert await loop.tick(plane.now) == 1
    (row,) = await plane.rows(outbox)
    assert (row.tries, row.last_error, row.delivered_at) == (2, None, plane.now)


async def test_a_notice_is_given_up_in_the_end(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.run()
    receiver = Receiver()
    receiver.status = 400
    loop = receiver.loop(plane)
    for _ in range(MAX_TRIES + 5):
        await loop.tick(plane.later(3600))
    (row,) = await plane.rows(outbox)
    assert (row.tries, row.last_error) == (MAX_TRIES, "answered 400")
    assert row.delivered_at is not None


async def test_without_a_webhook_nothing_piles_up(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.run()
    assert await Receiver().loop(plane, url=None).tick(plane.now) == 1
    assert all(row.delivered_at for row in await plane.rows(outbox))


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("url", [None, "http://hook.test"])
async def test_a_deposed_leader_notes_no_delivery_and_no_failure(
    plane: ControlPlane, status: int, url: str | None
) -> None:
    await plane.add_nodes(1)
    await plane.run()
    receiver = Receiver()
    receiver.status = status
    await plane.depose()
    assert await receiver.loop(plane, url).tick(plane.now) == 0
    (row,) = await plane.rows(outbox)
    assert (row.tries, row.delivered_at, row.last_error) == (0, None, None)


async def test_who_learns_that_another_leads_posts_no_more(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    await plane.report(plane.ended(attempt, 0))
    receiver = Receiver()

    async def answer(request: httpx.Request) -> httpx.Response:
        await plane.leader.resign()
        return receiver(request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    loop = DeliverOutbox(plane.engine, plane.leader, webhook_url="http://hook.test", client=client)
    assert await loop.tick(plane.now) == 1
    assert [body["topic"] for body in receiver.bodies] == ["job.running"]


async def test_what_was_delivered_meanwhile_stays_delivered(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.run()
    (row,) = await plane.rows(outbox)
    async with plane.engine.begin() as conn:
        await mark_delivered(conn, [row.id], now=plane.now)
        await mark_failed(conn, row.id, error="late", due_at=plane.now, now=plane.now, give_up=False)
    (row,) = await plane.rows(outbox)
    assert (row.delivered_at, row.last_error) == (plane.now, None)


async def test_who_delivers_no_longer_takes_its_time(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx_server.loops.deliver_outbox.BATCH", 1)
    await plane.add_nodes(1)
    await plane.run()
    loop = Receiver().loop(plane)
    await loop.tick(plane.now)
    assert loop.pause_s == 0
    await plane.leader.resign()
    assert await loop.tick(plane.now) == 0
    assert loop.pause_s == deliver_outbox.INTERVAL_S


# ------------------------------------------------------------------ retention

KEEP = Keep(metrics=timedelta(days=7), events=timedelta(days=90), logs=timedelta(days=30))


def retain_of(plane: ControlPlane) -> Retain:
    bundles = BundleFiles(plane.storage.as_uri())
    outputs = OutputFiles(plane.storage.as_uri())
    return Retain(plane.engine, plane.leader, keep=KEEP, files=plane.files, bundles=bundles, outputs=outputs)


async def partitions(plane: ControlPlane, table: str) -> set[str]:
    query = f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{table}'::regclass"
    async with plane.engine.connect() as conn:
        return set((await conn.exec_driver_sql(query)).scalars())


async def test_what_is_old_is_forgotten_and_what_comes_has_a_place(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    retain = retain_of(plane)
    await retain.tick(plane.now)
    today, after, monday = (f"{START + timedelta(days=days):%Y%m%d}" for days in (0, AHEAD.days, -START.weekday()))
    assert {f"metrics_{today}", f"metrics_{after}"} <= await partitions(plane, "metrics")
    assert f"metric_rollups_{monday}" in await partitions(plane, "metric_rollups")
    job_id, attempt = await plane.run()
    await plane.node_report("node-0", metrics=[plane.metric(attempt, loss=1.0)], logs=[plane.log(attempt, "x" * 100)])
    await plane.report(plane.ended(attempt, 0))
    async with plane.engine.begin() as conn:
        key = {"scope": "s", "key": "k", "body_hash": b"", "status": 201, "response": {}, "created_at": plane.now}
        await conn.execute(insert(idempotency_keys).values(key))

    await retain.tick(plane.later(6 * 86400))
    assert len(await plane.rows(metrics)) == 1
    assert await plane.rows(idempotency_keys) == []
    await retain.tick(plane.later(3 * 86400))
    assert await plane.rows(metrics) == []
    assert f"metrics_{today}" not in await partitions(plane, "metrics")
    assert len(await plane.rows(logs)) == 1 and list(plane.storage.rglob("*-0000000002"))
    await retain.tick(plane.later(22 * 86400))
    assert await plane.rows(logs) == [] and not list(plane.storage.rglob("*-0000000002"))
    assert await plane.kinds(job_id) != []
    await retain.tick(plane.later(90 * 86400))
    assert await plane.kinds(job_id) == []
    assert await plane.rows(events) == []
    assert await plane.state(job_id) == "succeeded"


async def test_a_hold_that_crossed_a_cancel_is_forgotten(plane: ControlPlane) -> None:
    waits, cancelled = await plane.submit(), await plane.submit()
    await plane.tick()
    await cancel_job(plane.engine, cancelled, actor=SYSTEM, now=plane.now)
    async with plane.engine.begin() as conn:
        stray = {"job_id": cancelled, "reason": "capacity", "message": "m", "unblocks": [], "since": plane.now}
        await conn.execute(insert(holds).values(stray))
    await retain_of(plane).tick(plane.now)
    assert [row.job_id for row in await plane.rows(holds)] == [waits]


async def test_a_deposed_leader_forgets_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    await plane.node_report("node-0", logs=[plane.log(attempt, "x")])
    await plane.report(plane.ended(attempt, 0))
    before = await partitions(plane, "metrics")
    await plane.depose()
    await retain_of(plane).tick(plane.later(400 * 86400))
    assert await plane.kinds(job_id) != []
    assert len(await plane.rows(outbox)) == 2
    assert await partitions(plane, "metrics") == before


async def test_who_leads_waits_for_no_lock_for_long(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup reads a table for an hour: the lease, which the round has locked, must still be renewed."""
    monkeypatch.setattr("phalanx_server.actions.expect_lease.AT_MOST", "50ms")
    retain = retain_of(plane)
    async with plane.engine.connect() as backup:
        await backup.execute(select(metrics).limit(1))
        with pytest.raises(DBAPIError, match="timeout"):
            await retain.tick(plane.later(30 * 86400))
        assert await plane.leader.tick(plane.now) is not None


async def test_a_round_is_bounded_and_the_next_comes_soon_while_there_is_more(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx_server.store.retention.BATCH_ROWS", 2)
    retain = retain_of(plane)
    async with plane.engine.begin() as conn:
        key = {"scope": "s", "body_hash": b"", "status": 201, "response": {}, "created_at": plane.now}
        await conn.execute(insert(idempotency_keys), [key | {"key": str(number)} for number in range(5)])
    plane.later(6 * 86400)
    seen = []
    for _ in range(3):
        await retain.tick(plane.now)
        seen.append((len(await plane.rows(idempotency_keys)), retain.pause_s))
    assert seen == [(3, BUSY_INTERVAL_S), (1, BUSY_INTERVAL_S), (0, INTERVAL_S)]


async def test_events_and_logs_of_a_live_job_are_never_forgotten(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    await plane.node_report("node-0", logs=[plane.log(attempt, "x")])
    await retain_of(plane).tick(plane.later(400 * 86400))
    assert "running" in await plane.kinds(job_id)
    assert len(await plane.rows(logs)) == 1


# ------------------------------------------------------------------ the loop around a tick


async def test_an_error_costs_one_tick_and_not_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticking, "PAUSE_AFTER_ERROR_S", 0)
    seen: list[datetime] = []
    enough = asyncio.Event()

    async def tick(now: datetime) -> None:
        seen.append(now)
        if len(seen) == 1:
            raise RuntimeError("once")
        enough.set()

    task = asyncio.create_task(tick_forever(tick, lambda: asyncio.sleep(0), name="test"))
    async with asyncio.timeout(20):
        await enough.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(seen) >= 2
