"""A server whose storage takes no logs: all else arrives in time, and the logs once it does, once and in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import aside as aside_module
from phalanx_worker.node.link import Link
from phalanx_worker.node.outbox import Outbox
from phalanx_worker.node.spool import Spool
from phalanx_worker.protocol import Heartbeat, LogChunk, Mark, MetricPoint, NodeStats

pytestmark = pytest.mark.asyncio(loop_scope="session")


class FullStorage:
    """Makes a server answer as ours does where the logs of a report find no place, until `emptied`."""

    def __init__(self, server: Any) -> None:
        self._server, self._answer, self.refused = server, server._answer, 0
        server._answer = self.answer

    def answer(self, target: str, body: bytes) -> tuple[int, bytes]:
        if json.loads(body)["logs"]:
            self.refused += 1
            return 503, b'{"code": "storage_unavailable"}'
        return self._answer(target, body)

    def emptied(self) -> None:
        self._server._answer = self._answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to let the time pass after which the storage is tried again."""
    passed_s = 0.0
    real = aside_module.time.monotonic

    class Time:
        @staticmethod
        def monotonic() -> float:
            return real() + passed_s

    monkeypatch.setattr(aside_module, "time", Time)

    def later() -> None:
        nonlocal passed_s
        passed_s += 60

    return later


def chunk(number: int) -> LogChunk:
    return LogChunk("att_a", 1, rank=0, stream="stdout", offset=number, data="x", at=1.0)


def new_link(outbox: Outbox, spool: Spool) -> Link:
    return Link(outbox, spool, lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))


async def send(link: Link, outbox: Outbox, *numbers: int) -> None:
    for number in numbers:
        outbox.put(chunk(number))
        outbox.put(MetricPoint("att_a", 1, rank=0, at=1.0, step=number, values={"loss": 1.0}))
        outbox.put(Mark("att_a", 1, rank=0, kind="checkpoint", at=1.0, data={"step": number}))
        await link.deliver()


async def test_only_logs_wait_for_a_full_storage(server: Any, tmp_path: Path, clock: Callable[[], None]) -> None:
    storage, outbox, spool = FullStorage(server), Outbox("boot"), Spool(tmp_path)
    link = new_link(outbox, spool)
    await link.configure(server_url=server.url, token="token", heartbeat_s=60.0)
    await send(link, outbox, *range(10))
    assert [point["step"] for point in server.items("metrics", "att_a")] == list(range(10))
    assert [mark["data"]["step"] for mark in server.marks("att_a", "checkpoint")] == list(range(10))
    assert storage.refused == 1, "it is not asked again before its time"
    assert not link.holds(("att_a", 1)), "the end of the attempt need not wait for its logs"
    assert link._heartbeat_due and server.reports[-1]["heartbeat"]["spool_bytes"] > 0
    clock()
    await link.deliver()
    assert storage.refused == 2
    storage.emptied()
    await link.deliver()
    assert not server.items("logs", "att_a")
    clock()
    await send(link, outbox, 10)
    assert [each["offset"] for each in server.items("logs", "att_a")] == list(range(11)), "in order, the newest last"
    assert len(server.items("metrics", "att_a")) == 11 and not server.marks("att_a", "dropped")
    numbers = [report["seq"] for report in server.reports]
    assert numbers == sorted(set(numbers))
    await send(link, outbox, 11)
    assert [point["step"] for point in server.reports[-1]["metrics"]] == [11]
    assert [each["offset"] for each in server.reports[-1]["logs"]] == [11], "as ever"
    await link.close()


async def test_logs_put_aside_survive_the_runner_and_a_report_whose_answer_was_lost(
    server: Any, tmp_path: Path, clock: Callable[[], None]
) -> None:
    server.status = 500
    outbox = Outbox("first")
    link = new_link(outbox, Spool(tmp_path))
    await link.configure(server_url=server.url, token="token", heartbeat_s=60.0)
    await send(link, outbox, 0)
    server.status = 200
    storage = FullStorage(server)
    await link.deliver()
    (taken,) = [report for report in server.reports if report["metrics"]]
    assert taken["seq"] == server.rejected[0]["seq"], "had it been taken before, the server would know by its number"
    await send(link, outbox, 1)
    await link.close()
    storage.emptied()
    outbox = Outbox("second")
    link = new_link(outbox, Spool(tmp_path))
    await link.configure(server_url=server.url, token="token", heartbeat_s=60.0)
    clock()
    await link.deliver()
    assert [each["offset"] for each in server.items("logs", "att_a")] == [0, 1]
    await link.close()
    assert not list(tmp_path.rglob("*.batch"))  # noqa: ASYNC240 - small and in memory


async def test_what_the_bound_costs_is_told(server: Any, tmp_path: Path) -> None:
    storage, outbox = FullStorage(server), Outbox("boot")
    link = new_link(outbox, Spool(tmp_path, limit_bytes=4 << 20))
    await link.configure(server_url=server.url, token="token", heartbeat_s=60.0)
    await send(link, outbox, 0)
    for number in range(8):
        outbox.put(replace(chunk(1 + number), data="x" * (1 << 20)))
        await link.deliver()
    assert link._aside.spool.size_bytes <= 4 << 20
    storage.emptied()
    link._aside._again_at = 0.0
    await link.deliver()
    kept = [each["offset"] for each in server.items("logs", "att_a")]
    assert kept and kept == list(range(kept[0], 9))
    assert sum(mark["data"]["count"] for mark in server.marks("att_a", "dropped")) == 9 - len(kept)
    await link.close()


async def test_an_overloaded_server_is_given_the_time_it_asks_for(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox("boot")
    link = new_link(outbox, Spool(tmp_path))
    await link.configure(server_url=server.url, token="token", heartbeat_s=60.0)
    head = server._head
    monkeypatch.setattr(
        server, "_head", lambda status, body: head(status, body).replace(b"\r\n\r\n", b"\r\nRetry-After: 7\r\n\r\n")
    )
    answer = server._answer
    monkeypatch.setattr(server, "_answer", lambda *_: (503, b'{"code": "overloaded"}'))
    for number in range(5):
        await send(link, outbox, number)
    assert link._retry_after_s == 7.0
    assert not server.reports, "no heartbeat alone: it has not even looked"
    monkeypatch.setattr(server, "_answer", answer)
    await link.deliver()
    assert [each["offset"] for each in server.items("logs", "att_a")] == list(range(5))
    await link.close()


async def test_no_retry_after_makes_a_runner_look_lost(tmp_path: Path) -> None:
    """A proxy may ask for any time; a node whose runner is silent for 20 s is given up, with all that runs there."""
    link = new_link(Outbox("boot"), Spool(tmp_path))
    link._failures, link._retry_after_s = 100, 3600.0
    assert link._pause_s() < 20
