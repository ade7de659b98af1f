"""The storage of logs and code is full, for real: a node loses nothing but time, and only for its logs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.domain.errors import StorageUnavailable
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store import logs as log_store
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.schema import metrics

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, mount_disk: Any) -> Any:
    return mount_disk(tmp_path / "storage", 2 * MIB)


@pytest.fixture
def settings(settings: Settings, disk: Any) -> Settings:
    return settings.model_copy(update={"storage_url": f"file://{disk.path}"})


async def an_attempt(world: Any, alice: httpx.AsyncClient, job_file: Any) -> tuple[str, str]:
    """A job that runs on n0: its id, and its attempt's."""
    job = (await alice.post("/v1/jobs", json=job_file())).json()["id"]
    return job, await world.place(job)


def report(attempt: str, seq: int, *, text: str = "") -> dict[str, Any]:
    """A heartbeat, a metric point, and logs if there is `text`."""
    part = {"attempt_id": attempt, "epoch": 1, "rank": 0, "at": time.time()}
    beat = {"attempts": [], "stats": {"cpu_utilization": seq / 10, "memory_bytes": 1}, "warm_ready": True}
    chunk = part | {"stream": "stdout", "offset": 0, "data": base64.b64encode(text.encode()).decode()}
    return {
        "boot": "b1",
        "seq": seq,
        "sent_at": time.time(),
        "heartbeat": beat,
        "metrics": [part | {"step": seq, "values": {"loss": 1.0}}],
        "logs": [chunk] if text else [],
    }


async def test_a_report_whose_logs_find_no_place_is_heard_and_may_come_again(
    world: Any, alice: httpx.AsyncClient, calls: Any, job_file: Any, disk: Any
) -> None:
    job, attempt = await an_attempt(world, alice, job_file)
    runner, text = calls("n0"), "hello\n" * 1000
    await world.silence("n0")
    disk.fill()
    answer = await runner.post("/v1/node/reports", json=report(attempt, 5, text=text))
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (503, "storage_unavailable"), answer.text
    assert answer.headers["retry-after"] == "2" and "No space left" in problem["detail"]
    assert await world.silent_s("n0") < 60, "the node is not given up"
    assert await world.count(metrics) == 0
    without = await runner.post("/v1/node/reports", json=report(attempt, 5))
    assert without.json()["accepted_seq"] == 5, "its number was not taken"
    assert await world.count(metrics) == 1
    disk.empty()
    for seq in (6, 6):
        again = await runner.post("/v1/node/reports", json=report(attempt, seq, text=text))
        assert again.status_code == 200 and again.json()["accepted_seq"] == 6
    assert (await alice.get(f"/v1/jobs/{job}/logs?attempt=1")).text == text
    assert await world.count(metrics) == 2, "nothing is doubled"


async def test_a_write_that_fails_leaves_nothing_behind(disk: Any) -> None:
    files = LogFiles(f"file://{disk.path}")
    with pytest.raises(StorageUnavailable, match="No space left"):
        await files.write("logs/a/b", b"x" * (3 * MIB))
    await files.write("logs/a/b", b"x" * MIB)


async def test_storage_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, world: Any, app: FastAPI, calls: Any, alice: Any, job_file: Any
) -> None:
    released = threading.Event()
    monkeypatch.setattr(log_store, "PATIENCE_S", 0.05)
    files = app.state.services.log_files
    monkeypatch.setattr(files, "_write", lambda *_: released.wait())
    _, attempt = await an_attempt(world, alice, job_file)
    await world.silence("n0")
    reports = [report(attempt, seq, text="hello") for seq in range(1, 2 * log_store.THREADS)]
    answers = await asyncio.gather(*(calls("n0").post("/v1/node/reports", json=each) for each in reports))
    released.set()
    assert {answer.json()["code"] for answer in answers} == {"storage_unavailable"}
    assert "does not answer" in answers[0].json()["detail"]
    assert await world.silent_s("n0") < 60


async def test_storage_that_hangs_is_asked_no_more_until_it_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every node tries again and again: if each try took its time, they would fill the gate of all reports."""
    released = threading.Event()
    files = LogFiles(f"file://{tmp_path}")
    monkeypatch.setattr(log_store, "PATIENCE_S", 0.05)
    with monkeypatch.context() as hung:
        hung.setattr(files, "_write", lambda *_: released.wait())
        tries = (files.write("logs/a/b", b"x") for _ in range(2 * log_store.THREADS))
        assert {type(each) for each in await asyncio.gather(*tries, return_exceptions=True)} == {StorageUnavailable}
    monkeypatch.setattr(log_store, "PATIENCE_S", 3600.0)
    async with asyncio.timeout(10):
        with pytest.raises(StorageUnavailable, match="does not answer"):
            await files.write("logs/a/b", b"x")
    assert files.waiting == log_store.THREADS, "nothing new was put in line"
    released.set()
    async with asyncio.timeout(10):
        while files.hung:  # noqa: ASYNC110 - a thread ends without a word
            await asyncio.sleep(0.01)
        await files.write("logs/a/b", b"x")


async def test_the_logs_of_a_report_are_written_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, app: FastAPI, world: Any, alice: httpx.AsyncClient, calls: Any, job_file: Any
) -> None:
    """One after another, those of many attempts in slow storage would keep the heartbeat waiting for longer than a node
    may be silent."""
    meet = threading.Barrier(3, timeout=10)
    monkeypatch.setattr(app.state.services.log_files, "_write", lambda *_: meet.wait())
    found = [report((await an_attempt(world, alice, job_file))[1], 1, text="hello") for _ in range(3)]
    together = found[0] | {"logs": [chunk for each in found for chunk in each["logs"]]}
    answer = await calls("n0").post("/v1/node/reports", json=together)
    assert answer.status_code == 200 and answer.json()["refused"] == [], answer.text


async def test_a_storage_whose_root_is_gone_is_one_that_is_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So s3fs speaks of a bucket that is not there."""
    files = LogFiles(f"file://{tmp_path}")

    def gone(*_: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(files, "_write", gone)
    with pytest.raises(StorageUnavailable, match="bucket"):
        await files.write("logs/a/b", b"x")
    with pytest.raises(FileNotFoundError):
        await files.read("logs/a/b", offset=0, length=1)


async def test_transfers_that_hang_hold_up_no_thread_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plans and the page of the metrics are made in threads, too."""
    released, threads = threading.Event(), 64
    bundles, outputs = BundleFiles(f"file://{tmp_path}"), OutputFiles(f"file://{tmp_path}")
    monkeypatch.setattr(bundles, "_size", lambda _: released.wait())
    monkeypatch.setattr(outputs._fs, "size", lambda _: released.wait())
    hung = [asyncio.create_task(bundles.size_bytes("0" * 64)) for _ in range(threads)]
    hung += [asyncio.create_task(outputs.size_bytes("x")) for _ in range(threads)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(10):
            assert await asyncio.to_thread(lambda: 1) == 1
    finally:
        released.set()
        await asyncio.gather(*hung, return_exceptions=True)


async def test_logs_of_an_attempt_that_ended_meanwhile_are_taken_later(
    world: Any, alice: httpx.AsyncClient, calls: Any, job_file: Any
) -> None:
    job, attempt = await an_attempt(world, alice, job_file)
    async with world.engine.begin() as conn:
        id: UUID = ids.parse("attempt", attempt)
        await conn.exec_driver_sql(
            f"UPDATE attempts SET state = 'ended', outcome = 'failed', ended_at = now() WHERE id = '{id}'"
        )
        await conn.exec_driver_sql(f"UPDATE jobs SET epoch = 2 WHERE id = '{ids.parse('job', job)}'")
    late = report(attempt, 1, text="last words\n") | {"metrics": []}
    answer = await calls("n0").post("/v1/node/reports", json=late)
    assert answer.json()["refused"] == [], answer.text
    assert (await alice.get(f"/v1/jobs/{job}/logs?attempt=1")).text == "last words\n"
    metric = await calls("n0").post("/v1/node/reports", json=report(attempt, 2))
    assert [refused["reason"] for refused in metric.json()["refused"]] == ["stale_epoch"]


async def test_a_bundle_for_which_there_is_no_place_can_be_sent_again(alice: httpx.AsyncClient, disk: Any) -> None:
    bundle = b"\x1f\x8b" + random.Random(1).randbytes(MIB)
    url = f"/v1/bundles/{hashlib.sha256(bundle).hexdigest()}"
    disk.fill()
    answer = await alice.put(url, content=bundle)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2", answer.text
    assert (await alice.head(url)).status_code == 404
    disk.empty()
    assert (await alice.put(url, content=bundle)).status_code == 201
