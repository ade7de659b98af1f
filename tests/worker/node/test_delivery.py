"""Reports on their way to the server: outages, restarts, refusals, bounds."""

# ruff: noqa: ASYNC240 - a test may look into /proc and its own small files
from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import logs
from phalanx_worker.node import spool as spool_module
from phalanx_worker.node.link import Link
from phalanx_worker.node.logs import LogBudget, LogStream
from phalanx_worker.node.outbox import MAX_BATCH_BYTES, Batch, Outbox, shrink, to_item
from phalanx_worker.node.ranks import Group
from phalanx_worker.node.reports import ReportSocket
from phalanx_worker.node.spool import Spool
from phalanx_worker.node.transfers import Transfers
from phalanx_worker.protocol import Heartbeat, LogChunk, Mark, MetricPoint, NodeStats
from phalanx_worker.runtime import channel

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHATTY = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.15; done"


def point(number: int, attempt: str = "att_a") -> MetricPoint:
    return MetricPoint(attempt, 1, rank=0, at=1.0, step=number, values={"loss": 1.0})


def chunk(text: str, attempt: str = "att_a") -> LogChunk:
    return LogChunk(attempt, 1, rank=0, stream="stdout", offset=0, data=text, at=1.0)


async def test_outage_is_survived_and_made_up_for_in_order(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    attempt = make_workbench([runner], server, tmp_path).attempt(CHATTY)
    await attempt.start()
    await attempt.printed("line 1")
    await server.stop()
    await attempt.exits()
    assert runner._duties.link._spool.size_bytes > 0
    await server.start()
    await server.until(lambda: "line 6" in server.text(attempt.id, rank=0))
    assert server.text(attempt.id, rank=0) == "".join(f"line {number}\n" for number in range(1, 7))
    sequence = [report["seq"] for report in server.reports]
    assert sequence == sorted(sequence)


async def test_what_is_unsent_survives_the_runner(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    server.status = 503
    runner = await light_runner(server)
    attempt = make_workbench([runner], server, tmp_path).attempt("echo kept")
    await attempt.run()
    first_boot = runner.boot
    await runner.close()
    server.status = 200
    await light_runner(server)
    await server.until(lambda: server.text(attempt.id, rank=0) == "kept\n")
    assert server.reports[0]["boot"] == first_boot
    assert not list((tmp_path / "light" / "attempts").iterdir())


async def test_heartbeats_name_live_attempts(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, heartbeat_s=0.1)
    attempt = await make_workbench([runner], server, tmp_path).attempt("sleep 30").start()
    wanted = [{"attempt_id": attempt.id, "epoch": attempt.desired.epoch}]
    await server.until(lambda: server.reports[-1]["heartbeat"]["attempts"] == wanted)
    await attempt.forget()
    await server.until(lambda: server.reports[-1]["heartbeat"]["attempts"] == [])
    heartbeat = server.reports[-1]["heartbeat"]
    assert heartbeat["stats"]["memory_bytes"] > 0 and 0 <= heartbeat["stats"]["cpu_utilization"] <= 1
    assert heartbeat["warm_ready"] is False


async def test_refused_attempt_is_not_sent_again(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, heartbeat_s=0.1)
    attempt = await make_workbench([runner], server, tmp_path).attempt("while echo more; do sleep 0.02; done").start()
    await attempt.printed("more")
    server.refused = [{"attempt_id": attempt.id, "epoch": attempt.desired.epoch, "reason": "stale_epoch"}]
    await server.until(
        lambda: runner._duties.outbox.is_refused(attempt.desired.attempt_id and (attempt.id, attempt.desired.epoch))
    )
    seen = len(server.reports)
    await server.until(lambda: len(server.reports) > seen + 4)
    assert not [report for report in server.reports[seen + 1 :] if report["logs"]]


async def test_a_server_that_rejects_even_a_heartbeat_costs_nothing(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, heartbeat_s=0.1)
    server.status = 422
    attempt = await make_workbench([runner], server, tmp_path).attempt("echo kept").start()
    await server.until(lambda: any(report["logs"] for report in server.rejected))
    server.status = 200
    await server.until(lambda: server.text(attempt.id, rank=0) == "kept\n")
    assert not server.marks(attempt.id, "dropped")


class Picky:
    """A server that answers `status` to any report with an item that says "bad"."""

    def __init__(self, server: Any, status: int):
        self.server, self.status, self.bad = server, status, 0
        self._answer = server._answer
        server._answer = self.answer

    def answer(self, target: str, body: bytes) -> tuple[int, bytes]:
        if b"bad" not in body:
            return self._answer(target, body)
        self.bad += 1
        return self.status, b'{"code": "a_code"}'


def link_to(server: Any, tmp_path: Path) -> tuple[Link, Outbox]:
    outbox = Outbox("boot")
    return Link(outbox, Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True)), outbox


async def test_only_the_item_that_the_server_rejects_is_lost(server: Any, tmp_path: Path) -> None:
    Picky(server, 422)
    link, outbox = link_to(server, tmp_path)
    await link.configure(server_url=server.url, token="token", heartbeat_s=1.0)
    for number in range(50):
        outbox.put(replace(chunk("bad" if number == 17 else "good"), offset=number, rank=3))
    outbox.put(Mark("att_b", 1, rank=0, kind="finished", at=1.0))
    while outbox.size_bytes or len(link._spool):
        await link.deliver()
    await link.close()
    assert [item["offset"] for item in server.items("logs", "att_a")] == [each for each in range(50) if each != 17]
    assert len(server.marks("att_b", "finished")) == 1 and not server.marks("att_b", "dropped")
    (dropped,) = server.marks("att_a", "dropped")
    assert (dropped["rank"], dropped["data"]["what"], dropped["data"]["count"]) == (3, "logs", 1)
    numbers = [report["seq"] for report in server.reports]
    assert numbers == sorted(set(numbers))


async def test_a_report_over_which_the_server_fails_lets_heartbeats_and_others_pass(
    server: Any, tmp_path: Path
) -> None:
    picky = Picky(server, 500)
    link, outbox = link_to(server, tmp_path)
    await link.configure(server_url=server.url, token="token", heartbeat_s=1.0)
    outbox.put(chunk("bad"))
    outbox.put(chunk("good"))
    sent = 0
    while outbox.size_bytes or len(link._spool):
        await link.deliver()
        if sent < 30:
            outbox.put(replace(chunk("other", "att_b"), offset=sent))
            sent += 1
    await link.deliver()
    await link.close()
    assert [item["offset"] for item in server.items("logs", "att_b")] == list(range(30))
    assert [item["data"] for item in server.items("logs", "att_a")] == ["good"]
    assert [mark["data"]["count"] for mark in server.marks("att_a", "dropped")] == [1]
    assert picky.bad < 20


async def test_logs_wait_while_the_server_can_store_none(server: Any, tmp_path: Path) -> None:
    picky = Picky(server, 503)
    link, outbox = link_to(server, tmp_path)
    await link.configure(server_url=server.url, token="token", heartbeat_s=1.0)
    for number in range(20):
        outbox.put(replace(chunk("bad"), offset=number))
        outbox.put(point(number))
        await link.deliver()
    assert server.reports and all(report["heartbeat"] for report in server.reports)  # the node is not given up
    server._answer = picky._answer
    while outbox.size_bytes or len(link._spool):
        await link.deliver()
    await link.close()
    assert sorted(item["offset"] for item in server.items("logs", "att_a")) == list(range(20))


async def test_an_item_over_the_size_of_a_batch_is_sent_alone(server: Any, tmp_path: Path) -> None:
    link, outbox = link_to(server, tmp_path)
    await link.configure(server_url=server.url, token="token", heartbeat_s=1.0)
    outbox.put(chunk("x" * (MAX_BATCH_BYTES + 1)))
    outbox.put(chunk("next"))
    assert [len(outbox.next_batch().items) for _ in range(3)] == [1, 1, 0]
    assert not outbox.filled.is_set()
    await link.close()


async def test_logs_over_the_limit_are_dropped_and_said(workbench: Any) -> None:
    attempt = workbench.attempt("yes 0123456789 | head -c 3000000", log_limit_bytes=1_000_000)
    await attempt.run()
    server = workbench.server
    await server.until(lambda: bool(server.marks(attempt.id, "dropped")))
    assert len(server.text(attempt.id, rank=0)) == 1_000_000
    assert server.marks(attempt.id, "dropped")[0]["data"] == {"what": "logs", "count": 1, "bytes": 2_000_000}
    assert max(len(chunk["data"]) for chunk in server.items("logs", attempt.id)) <= 4 * 65536 / 3 + 4


async def test_flood_of_metrics_is_merged_and_counted(workbench: Any) -> None:
    script = workbench.script("""
        import time, phalanx
        for step in range(1, 4001):
            phalanx.report(step=step, loss=float(step))
            if step % 20 == 0: time.sleep(0.002)
    """)
    attempt = workbench.attempt(f"python {script}")
    await attempt.run()
    points = workbench.server.items("metrics", attempt.id)
    dropped = sum(mark["data"]["count"] for mark in workbench.server.marks(attempt.id, "dropped"))
    assert len(points) + dropped == 4000 and 0 < len(points) < 4000


async def test_nonsense_from_a_rank_is_counted_not_believed(workbench: Any) -> None:
    script = workbench.script("""
        import json, os, socket
        s = socket.socket(fileno=int(os.environ["PHALANX_REPORT_FD"]))
        for data in [
            b"{",
            b"[]",
            b"x" * 40000,
            b'{"t":"metrics","at":"no","step":[],"values":{"a":1e999,"b":"word","c":2}}',
            b'{"t":"metrics","values":{"d":' + b"9" * 4000 + b"}}",
            b'{"t":"mark","kind":"oom","at":1,"data":{}}',
        ]:
            s.send(data)
        s.detach()
    """)
    attempt = workbench.attempt(f"python {script}")
    assert (await attempt.run())[0]["exit_code"] == 0
    await workbench.server.until(lambda: bool(workbench.server.marks(attempt.id, "dropped")))
    assert [item["values"] for item in workbench.server.items("metrics", attempt.id)] == [{"c": 2}]
    assert not workbench.server.marks(attempt.id, "oom")


async def test_a_new_token_does_not_disturb_a_bundle_on_its_way(server: Any, tmp_path: Path) -> None:
    link = Link(Outbox("boot"), Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    server.bundles["0" * 64] = b"x" * (8 << 20)
    await link.configure(server_url=server.url, token="old", heartbeat_s=1.0)
    received = 0
    async with Transfers(link).fetch_bundle("0" * 64, "att_a") as chunks:
        async for part in chunks:
            if not received:
                await link.configure(server_url=server.url, token="new", heartbeat_s=1.0)
            received += len(part)
    await link.close()
    assert received == 8 << 20


async def test_what_comes_faster_than_it_is_sent_waits_on_disk_in_order(server: Any, tmp_path: Path) -> None:
    outbox, spool = Outbox("boot"), Spool(tmp_path)
    link = Link(outbox, spool, lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    await link.configure(server_url=server.url, token="token", heartbeat_s=1.0)
    answer, sent = server._answer, 0

    def flood(target: str, body: bytes) -> tuple[int, bytes]:
        """While each of the first reports is under way 8 MiB come: twice as much as fits into memory."""
        nonlocal sent
        if sent < 32:
            for offset in range(sent + 1, sent + 9):
                outbox.put(replace(chunk("x" * (1 << 20)), offset=offset))
            sent += 8
        return answer(target, body)

    server._answer = flood
    outbox.put(chunk("first"))
    while outbox.size_bytes or len(spool) or sent < 32:
        await link.deliver()
    await link.close()
    offsets = [item["offset"] for report in server.reports for item in report["logs"]]
    assert offsets == list(range(33))
    assert [report["seq"] for report in server.reports] == sorted(report["seq"] for report in server.reports)


async def test_marks_of_a_rank_that_ended_without_reading_its_stop_are_not_lost() -> None:
    """The kernel then answers with ECONNRESET first, and only after that with what the rank had sent."""
    ours, theirs = channel.pair()
    marks: list[Mark] = []
    reports = ReportSocket(ours, ("att_a", 1), 0, lambda _: None, marks.append)
    reports.tell_stop()
    channel.send(theirs, {"t": "mark", "kind": "checkpoint", "data": {"url": "/last"}})
    channel.send(theirs, {"t": "mark", "kind": "finished", "data": {}})
    theirs.close()
    reports.close()
    assert [mark.kind for mark in marks] == ["checkpoint", "finished"]


async def test_signs_of_life_use_up_no_room_for_the_last_words() -> None:
    """Of a rank that gives one for each batch of an evaluation, say."""
    ours, theirs = channel.pair()
    marks: list[Mark] = []
    put: list[MetricPoint | Mark] = []
    reports = ReportSocket(ours, ("att_a", 1), 0, put.append, marks.append)
    for _ in range(10):
        for _ in range(100):
            channel.send(theirs, {"t": "mark", "kind": "alive", "data": {}})
        reports.drain()
    channel.send(theirs, {"t": "mark", "kind": "health", "data": {"action": "stop"}})
    channel.send(theirs, {"t": "mark", "kind": "finished", "data": {}})
    theirs.close()
    reports.close()
    assert [mark.kind for mark in marks] == ["alive"] * 1000 + ["health", "finished"]
    assert [mark.kind for mark in put if isinstance(mark, Mark)] == ["health", "finished"]


async def test_that_it_is_finished_is_heard_of_a_rank_that_said_too_much_and_once() -> None:
    ours, theirs = channel.pair()
    put: list[Any] = []
    reports = ReportSocket(ours, ("att_a", 1), 0, put.append, lambda _: None)
    for _ in range(10):
        for _ in range(100):
            channel.send(theirs, {"t": "mark", "kind": "note", "data": {"message": "hello"}})
        reports.drain()
    for _ in range(3):
        channel.send(theirs, {"t": "mark", "kind": "finished", "data": {}})
    theirs.close()
    reports.close()
    assert [mark.kind for mark in put] == ["note"] * 600 + ["finished", "dropped"]


async def test_what_a_checkpoint_is_registered_with_may_be_refused_but_not_the_checkpoint() -> None:
    ours, theirs = channel.pair()
    put: list[Any] = []
    reports = ReportSocket(ours, ("att_a", 1), 0, put.append, lambda _: None)
    settings = b'{"a":' * 30 + b"1" + b"}" * 30
    theirs.send(b'{"t":"mark","kind":"checkpoint","data":{"url":"/c","step":4,"settings":' + settings + b"}}")
    theirs.close()
    reports.close()
    checkpoint, dropped = put
    assert checkpoint.data == {"url": "/c", "step": 4}
    assert (dropped.kind, dropped.data["count"]) == ("dropped", 1)


@pytest.mark.parametrize("code", [0, 3])
async def test_what_a_rank_says_right_before_it_ends_reaches_the_server(workbench: Any, code: int) -> None:
    """While the runner rests from reading it."""
    script = workbench.script(f"""
        import os, time
        import phalanx
        phalanx.report(step=1, loss=2.0)
        time.sleep(0.03)
        phalanx.report(step=2, loss=1.0)
        phalanx.checkpoint("/last", step=2)
        phalanx.finished()
        os._exit({code})
    """)
    attempt = workbench.attempt(f"python {script}")
    assert [(end["exit_code"], end["finished"]) for end in await attempt.run()] == [(code, True)]
    await workbench.server.until(lambda: bool(workbench.server.marks(attempt.id, "finished")))
    assert [mark["data"]["step"] for mark in workbench.server.marks(attempt.id, "checkpoint")] == [2]
    assert [point["step"] for point in workbench.server.items("metrics", attempt.id)] == [1, 2]


async def test_text_that_cannot_be_sent_is_replaced_and_deep_nesting_refused() -> None:
    ours, theirs = channel.pair()
    points: list[MetricPoint | Mark] = []
    reports = ReportSocket(ours, ("att_a", 1), 0, points.append, lambda _: None)
    deep = b"[" * 150 + b"]" * 150
    theirs.send(b'{"t":"metrics","values":{"lo\\ud800ss":1}}')
    theirs.send(b'{"t":"mark","kind":"note","data":{"message":["\\udfff",{"k\\ud800":1}]}}')
    theirs.send(b'{"t":"mark","kind":"note","data":{"a":' + deep + b"}}")
    theirs.send(b'{"t":"mark","kind":"finished","data":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}")
    theirs.close()
    reports.close()
    point, note, flat, dropped = points
    assert isinstance(point, MetricPoint) and point.values == {"lo?ss": 1}
    assert isinstance(note, Mark) and note.data == {"message": ["?", {"k?": 1}]}
    assert isinstance(flat, Mark) and flat.data == {}
    assert isinstance(dropped, Mark) and dropped.data["count"] == 2
    for message in points:
        to_item(message).text.encode("ascii")


async def test_a_datagram_that_breaks_the_reader_costs_only_itself() -> None:
    ours, theirs = channel.pair()
    marks: list[Any] = []

    def put(message: MetricPoint | Mark) -> None:
        if isinstance(message, MetricPoint):
            raise RecursionError
        marks.append(message)

    reports = ReportSocket(ours, ("att_a", 1), 0, put, lambda _: None)
    theirs.send(b'{"t":"metrics","values":{"a":1}}')
    theirs.send(b'{"t":"mark","kind":"finished","data":{}}')
    theirs.close()
    reports.close()
    assert [mark.kind for mark in marks] == ["finished", "dropped"]


async def test_word_of_a_guardian_that_ended_without_reading_its_stop_is_not_lost() -> None:
    group = object.__new__(Group)
    group._connection, guardian = channel.pair()
    group._connection.setblocking(False)
    group._tell({"op": "stop", "grace_s": 1.0})
    channel.send(guardian, {"op": "exit", "rank": 0, "status": 0, "at": 1.0})
    channel.send(guardian, {"op": "ended"})
    guardian.close()
    said = [await group._receive() for _ in range(3)]
    group._connection.close()
    assert [message and message["op"] for message in said] == ["exit", "ended", None]


async def test_an_outage_of_days_does_not_end_the_link(tmp_path: Path) -> None:
    link = Link(Outbox("boot"), Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    link._failures = 20_000
    link._urgent.set()
    await link._pause()


# ---------------------------------------------------------------- without a process


async def test_outbox_over_its_bound_gives_up_metrics_first_and_counts_them() -> None:
    outbox = Outbox("boot", limit_bytes=20_000)
    outbox.put(chunk("log " * 500))
    for number in range(300):
        outbox.put(point(number))
    outbox.put(Mark("att_a", 1, rank=0, kind="finished", at=1.0))
    items = outbox.next_batch().items
    assert sum(len(item.text) for item in items) <= 20_000
    assert [item.kind for item in items if item.kind == "logs"] == ["logs"]
    kinds = [json.loads(item.text)["kind"] for item in items if item.kind == "marks"]
    assert "dropped" in kinds and "finished" in kinds
    assert json.loads([item for item in items if item.kind == "metrics"][-1].text)["step"] == 299


async def test_marks_alone_do_not_grow_without_bound(tmp_path: Path) -> None:
    outbox, spool = Outbox("boot", limit_bytes=20_000), Spool(tmp_path, limit_bytes=20_000)
    large = Mark("att_a", 1, rank=0, kind="checkpoint", at=1.0, data={"url": "x" * 3000})
    for seq in range(20):
        outbox.put(large)
        spool.append(Batch("boot", seq, [to_item(large)]))
    assert outbox.size_bytes <= 20_000
    assert spool.size_bytes <= 20_000
    kinds = [json.loads(item.text)["kind"] for item in outbox.next_batch().items]
    assert kinds[0] == "dropped" and kinds[-1] == "checkpoint"


async def test_draining_ends_though_somebody_goes_on_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = os.pipe()
    stream = LogStream(near, LogBudget(1 << 30), lambda *_: None)

    def refill_and_read(fd: int, count: int) -> bytes:
        os.write(far, b"y" * 4096)
        return read(fd, count)

    read = os.read
    monkeypatch.setattr(logs.os, "read", refill_and_read)
    stream.drain()
    os.close(far)
    stream.close()


async def test_batch_body_is_the_protocols_json() -> None:
    batch = Batch("boot", 3, [to_item(point(1)), to_item(chunk("x"))])
    body = json.loads(batch.body(None))
    assert (body["boot"], body["seq"], body["heartbeat"], body["marks"]) == ("boot", 3, None, [])
    assert body["metrics"][0]["values"] == {"loss": 1.0} and body["logs"][0]["data"] == "x"


async def test_shrink_takes_logs_only_when_metrics_are_not_enough() -> None:
    items = [to_item(chunk("a" * 1000)), to_item(point(1)), to_item(chunk("b" * 1000))]
    kept, lost = shrink(items, target_bytes=1300)
    assert [item.kind for item in lost] == ["metrics", "logs"]
    assert "bbb" in kept[0].text


async def test_spool_keeps_order_over_restarts_and_sets_damage_aside(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append(Batch("one", 1, [to_item(chunk("first\nline"))]))
    spool.append(Batch("one", 2, [to_item(chunk("second"))]))
    reopened = Spool(tmp_path)
    reopened.append(Batch("two", 1, [to_item(chunk("third"))]))
    next(iter(sorted(tmp_path.glob("*.batch")))).write_bytes(b"{ damaged")
    found = []
    while stored := reopened.oldest():
        found.append((stored[1].boot, stored[1].seq))
        reopened.remove(stored[0])
    assert found == [("one", 2), ("two", 1)]
    assert reopened.size_bytes == 0


async def test_spool_over_its_bound_loses_oldest_metrics_then_oldest_logs(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=12_000)
    for seq in range(1, 10):
        points = [to_item(replace(point(number), rank=5)) for number in range(8)]
        spool.append(Batch("one", seq, [to_item(chunk("x" * 1000)), *points]))
    assert spool.size_bytes <= 12_000
    batches = drain(spool)
    points = [item for batch in batches for item in batch.items if item.kind == "metrics"]
    logs = [batch.seq for batch in batches if any(item.kind == "logs" for item in batch.items)]
    told = [json.loads(item.text) for batch in batches for item in batch.items if item.kind == "marks"]
    assert logs == list(range(10 - len(logs), 10)) and 1 < len(logs) < 9
    assert sum(mark["data"]["count"] for mark in told if mark["data"]["what"] == "metrics") + len(points) == 72
    assert sum(mark["data"]["count"] for mark in told if mark["data"]["what"] == "logs") + len(logs) == 9
    assert {(mark["rank"], mark["data"]["what"]) for mark in told} == {(5, "metrics"), (0, "logs")}


def drain(spool: Spool) -> list[Batch]:
    batches = []
    while stored := spool.oldest():
        batches.append(stored[1])
        spool.remove(stored[0])
    return batches


async def test_spool_over_its_bound_makes_room_for_many_batches_and_reads_none_that_it_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, read = Spool(tmp_path, limit_bytes=1 << 20), []
    original = spool_module._read
    monkeypatch.setattr(spool_module, "_read", lambda path: (read.append(path), original(path))[1])
    for seq in range(1, 400):
        spool.append(Batch("one", seq, [to_item(chunk("x" * 10_000))]))
    assert len(read) < 20
    batches = drain(spool)
    kept = sum(item.kind == "logs" for batch in batches for item in batch.items)
    told = sum(json.loads(i.text)["data"]["count"] for batch in batches for i in batch.items if i.kind == "marks")
    assert kept + told == 399 and len(batches) < 110


async def test_spool_reads_what_an_earlier_runner_wrote(tmp_path: Path) -> None:
    earlier = to_item(chunk("x" * 1000))
    (tmp_path / "000000000001-old-7.batch").write_text(f'{{"boot": "old", "seq": 7}}\nlogs ["att_a", 1] {earlier.text}')
    spool = Spool(tmp_path, limit_bytes=2_500)
    spool.append(Batch("new", 1, [to_item(chunk("y" * 1000))]))
    spool.append(Batch("new", 2, [to_item(chunk("z" * 1000))]))
    assert [batch.seq for batch in drain(spool)] == [2]
