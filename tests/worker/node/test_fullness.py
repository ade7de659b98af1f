"""How near a runner is to its bounds: each figure is what is really there, and what was given up is counted once."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import uploads
from phalanx_worker.node.bundles import Bundles
from phalanx_worker.node.environments import Environments, Wanted
from phalanx_worker.node.link import Link
from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.outbox import Batch, Outbox
from phalanx_worker.node.spool import Spool
from phalanx_worker.protocol import Fill, Heartbeat, LogChunk, MetricPoint, NodeStats

pytestmark = pytest.mark.asyncio(loop_scope="session")


def point(number: int) -> MetricPoint:
    return MetricPoint("att_a", 1, rank=0, at=1.0, step=number, values={"loss": 1.0})


def chunk(number: int) -> LogChunk:
    return LogChunk("att_a", 1, rank=0, stream="stdout", offset=number, data="x" * 100, at=1.0)


def count(batches: list[Batch], kind: str) -> int:
    return sum(item.kind == kind for batch in batches for item in batch.items)


def size_of(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern))


# ------------------------------------------------------------------ reports


async def test_what_the_memory_has_no_room_for_is_counted() -> None:
    outbox = Outbox("boot", limit_bytes=20_000)
    for number in range(1000):
        outbox.put(point(number))
        assert outbox.fill.used_bytes <= outbox.fill.limit_bytes == 20_000
    left = outbox.next_batch()
    assert outbox.dropped["metrics"] + count([left], "metrics") == 1000
    assert set(outbox.dropped) == {"metrics"} and outbox.fill.used_bytes == 0


async def test_what_the_disk_has_no_room_for_is_counted_once(tmp_path: Path) -> None:
    """`dropped` marks that are given up in their turn tell of what was counted before."""
    outbox, spool = Outbox("boot", limit_bytes=3_000), Spool(tmp_path, limit_bytes=1_000)
    for number in range(600):
        outbox.put(point(number))
        if number % 40 == 39:
            spool.append(outbox.next_batch())
            assert spool.fill == Fill(size_of(tmp_path, "*.batch"), 1_000)
    kept = []
    while (stored := spool.oldest()) is not None:
        kept.append(stored[1])
        spool.remove(stored[0])
    assert outbox.dropped["metrics"] > 0 and spool.dropped["metrics"] > 0
    assert outbox.dropped["metrics"] + spool.dropped["metrics"] + count(kept, "metrics") == 600
    assert outbox.dropped["marks"] == spool.dropped["marks"] == 0


async def test_a_link_counts_what_no_disk_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "append", refuse)
    outbox = Outbox("boot")
    link = Link(outbox, Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    outbox.put(point(0))
    outbox.put(chunk(0))
    await link.close()
    assert link.dropped == {"metrics": 1, "logs": 1}


async def test_a_link_counts_logs_that_neither_storage_nor_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    outbox = Outbox("boot")
    link = Link(outbox, Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    outbox.put(point(0))
    outbox.put(chunk(0))
    monkeypatch.setattr(link.spools[1], "append", refuse)
    left = link._put_aside(None, outbox.next_batch())
    assert count([left], "metrics") == 1 and link.dropped == {"logs": 1}


# ------------------------------------------------------------------ caches


def archive(text: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


async def test_bundles_say_what_they_take_those_that_cannot_be_unpacked_too(tmp_path: Path) -> None:
    served: dict[str, bytes] = {}

    @asynccontextmanager
    async def fetch(sha256: str, _: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async def body() -> AsyncIterator[bytes]:
            yield served[sha256]

        yield body()

    bundles = Bundles(tmp_path / "kept", fetch, limit_bytes=25_000)
    assert bundles.fill == Fill(0, 25_000)
    for number in range(6):
        data = archive(str(number)) if number % 2 else b"no archive" * 1_000
        sha256 = hashlib.sha256(data).hexdigest()
        served[sha256] = data
        try:
            await bundles.unpack(sha256, "att_a", tmp_path / str(number), None)
            assert number % 2
        except StartFailed:
            assert not number % 2
        assert 0 < bundles.fill.used_bytes == size_of(tmp_path / "kept", "*.tar") <= 25_000
    assert Bundles(tmp_path / "kept", fetch, limit_bytes=25_000).fill == bundles.fill


class FakeBuild:
    async def fingerprint(self) -> str:
        return "python"

    async def build(self, place: Path, log_path: Path, lines: list[str], *, uid: int | None, most_bytes: int) -> None:
        (place / "venv").mkdir(parents=True)
        (place / "venv" / "file").write_bytes(b"x" * (1 << 20))


def sizes_said(directory: Path) -> list[int]:
    return [json.loads(path.read_text())["size_bytes"] for path in directory.glob("*.json")]


async def test_environments_say_what_they_take(tmp_path: Path) -> None:
    def store() -> Environments:
        return Environments(tmp_path, FakeBuild(), 2_500_000, tuple)  # type: ignore[arg-type]

    environments = store()
    assert environments.fill == Fill(0, 2_500_000)
    for number in range(4):
        async with environments.hold(Wanted((str(number),), None), lambda _: None):
            said = sizes_said(tmp_path)
            assert environments.fill.used_bytes == sum(said) >= 1 << 20
    assert len(said) == 2, "the others were removed"
    await environments.close()
    assert store().fill == environments.fill


# ------------------------------------------------------------------ a runner


async def test_a_heartbeat_tells_all_of_it(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_PAUSE_S", (0.01, 0.05))
    server.output_answers = [429]
    runner = await light_runner(server, heartbeat_s=0.1)
    command = "head -c 5000 /dev/zero > $PHALANX_OUTPUT_DIR/zeros"
    attempt = await make_workbench([runner], server, tmp_path).attempt(command).start()

    def fullness() -> dict[str, Any]:
        return server.reports[-1]["heartbeat"]["fullness"]

    await server.until(lambda: fullness()["outputs"] == {"used_bytes": 5000, "limit_bytes": 0})
    server.output_answers = [200]
    await attempt.exits()
    await server.until(lambda: fullness()["outputs"]["used_bytes"] == 0)
    said = fullness()
    for name in ("outbox", "reports", "logs", "bundles", "environments"):
        assert 0 <= said[name]["used_bytes"] <= said[name]["limit_bytes"] > 0, name
    assert (said["warm_processes"], said["warm_processes_limit"]) == (1, 5)
    assert [said[f"dropped_{kind}"] for kind in ("logs", "metrics", "marks")] == [0, 0, 0]


async def test_output_files_that_are_given_up_wait_no_longer(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    server.output_answers = [413]
    runner = await light_runner(server)
    attempt = make_workbench([runner], server, tmp_path).attempt("echo x > $PHALANX_OUTPUT_DIR/x")
    await attempt.run()
    assert server.output_tries and runner._duties.transfers.waiting_bytes == 0
