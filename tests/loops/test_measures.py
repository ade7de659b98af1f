"""The scheduler's metrics: that each queue and its bound shows, that the page about them is true, and the port."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_plane import ControlPlane
from phalanx_server import scheduler_command
from phalanx_server.loops import ticking
from phalanx_server.loops.measures import Loops, PassMeasures, measure
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.settings import Settings
from phalanx_server.store.outbox import Notice, post_notices
from phalanx_server.store.wakeups import Wakeups
from prometheus_client import CollectorRegistry, generate_latest

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
HOOK = "http://127.0.0.1:1/"


class Measured:
    """A scheduler's loops, as `phalanx scheduler` makes them, and what they say."""

    def __init__(self, plane: ControlPlane, client: httpx.AsyncClient, root: Path) -> None:
        self.registry = CollectorRegistry()
        passes = PassMeasures(self.registry)
        settings = Settings(storage_url=f"file://{root}", webhook_url=HOOK)
        wakeups = Wakeups("postgresql://nobody")  # never started
        self.loops: Loops = scheduler_command._loops(
            settings, plane.engine, plane.leader, wakeups=wakeups, client=client, passes=passes
        )
        measure(self.registry, self.loops, passes, plane.engine)

    def __getitem__(self, name: str) -> float:
        """As Prometheus writes it, without its prefix: `leads`, `loop_failures_total{loop="retain"}`."""
        lines = generate_latest(self.registry).decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"phalanx_scheduler_{name} "))


@pytest.fixture
async def measured(plane: ControlPlane, tmp_path: Path) -> Any:
    async with httpx.AsyncClient() as client:
        yield Measured(plane, client, tmp_path)


def names(registry: CollectorRegistry) -> set[str]:
    found = re.findall(r"^# TYPE (\w+) \w+$", generate_latest(registry).decode(), re.MULTILINE)
    return {name for name in found if not name.endswith("_created")}


async def test_the_page_lists_what_there_is(measured: Measured) -> None:
    there = names(measured.registry)
    page = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert {name for name in page if name.startswith(("phalanx_scheduler_", "process_"))} == there
    assert {name.removesuffix("_limit") for name in there} <= there, "a bound of nothing"


async def test_a_pass_shows_what_it_looked_at_and_what_became_of_it(plane: ControlPlane, measured: Measured) -> None:
    await plane.add_nodes(2, gpus=4)
    for gpus in (4, 4, 2, 2, 1):
        await plane.submit(gpus=gpus)
    assert (measured["pass_queued_jobs"], measured["planner_jobs"], measured["hold_book_jobs"]) == (0, 0, 0)
    await measured.loops.schedule.tick(plane.now)
    assert (measured["leads"], measured["pass_seconds_count"]) == (1, 1)
    assert (measured["planner_jobs"], measured["planner_nodes"], measured["pass_changes"]) == (5, 2, 8)
    assert (measured["pass_queued_jobs"], measured["pass_classes"]) == (5, 3)
    assert (measured["pass_starts"], measured["starts_total"], measured["starts_dropped_total"]) == (2, 2, 0)
    assert (measured["hold_book_jobs"], measured["hold_book_words"]) == (3, 2)
    await measured.loops.schedule.tick(plane.later(1))
    assert (measured["pass_changes"], measured["pass_queued_jobs"], measured["pass_starts"]) == (2, 3, 0)
    assert measured["pass_age_seconds"] < 60


async def test_a_start_that_no_longer_holds_is_counted(
    plane: ControlPlane, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.add_nodes(1)
    await plane.submit()
    loop = measured.loops.schedule
    commit = loop._commit

    async def commit_late(memory: Any, plan: Any, now: Any) -> Any:
        plane.change_node("node-0", alive=False)
        await plane.send_inventory()
        return await commit(memory, plan, now)

    monkeypatch.setattr(loop, "_commit", commit_late)
    await loop.tick(plane.now)
    assert (measured["starts_total"], measured["starts_dropped_total"]) == (0, 1)


async def test_who_does_not_lead_says_so(plane: ControlPlane, measured: Measured) -> None:
    await plane.add_nodes(1)
    await measured.loops.schedule.tick(plane.now)
    assert (measured["leads"], measured["planner_nodes"], measured["lease_age_seconds_limit"]) == (1, 1, 600)
    assert 0 < measured["lease_age_seconds"] < 600
    await plane.leader.resign()
    await measured.loops.schedule.tick(plane.now)
    assert (measured["leads"], measured["planner_nodes"], measured["lease_age_seconds"]) == (0, 0, 0)


async def test_a_receiver_that_is_away_shows_as_a_backlog(plane: ControlPlane, measured: Measured) -> None:
    async with plane.engine.begin() as conn:
        await post_notices(conn, [Notice("a", {}), Notice("b", {})], now=plane.now)
    await measured.loops.outbox.tick(plane.later(30))
    assert (measured["outbox_due_notices"], measured["outbox_lag_seconds"], measured["outbox_failures_total"]) == (
        2,
        30,
        1,
    )


async def test_retention_that_falls_behind_shows(
    plane: ControlPlane, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    retain = measured.loops.retain

    async def more(*_: object) -> bool:
        return True

    await retain.tick(plane.now)
    assert retain.caught_up_at == plane.now
    monkeypatch.setattr(retain, "_round", more)
    await retain.tick(plane.later(600))
    assert retain.caught_up_at == plane.now - timedelta(seconds=600)
    assert measured["retention_lag_seconds"] >= 0


async def test_a_loop_that_fails_shows_until_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticking, "PAUSE_AFTER_ERROR_S", 0.0)
    pulse, seen = Pulse(), []

    async def tick(_: object) -> None:
        seen.append((pulse.failures, pulse.failing))
        if len(seen) < 3:
            raise RuntimeError("twice")
        if len(seen) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await tick_forever(tick, lambda: asyncio.sleep(0), name="test", pulse=pulse)
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert pulse.ticked_at_s is not None


async def test_every_loop_has_a_pulse(plane: ControlPlane, measured: Measured) -> None:
    """Each is told to `tick_forever`, or it would look well for ever."""
    plane.leader.elected.set()
    for name, loop in measured.loops.by_name.items():
        running = asyncio.create_task(loop.run_forever())
        async with asyncio.timeout(20):
            while loop.pulse.ticked_at_s is None:  # noqa: ASYNC110 - the end of a tick comes without a word
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert measured[f'loop_failing{{loop="{name}"}}'] == 0
        assert measured[f'loop_age_seconds{{loop="{name}"}}'] >= 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def scheduler(database: str, directory: Path, *options: str) -> Iterator[int]:
    """A real one, from when it runs on; its pid."""
    env = {"PHALANX_DATABASE_URL": database, "PHALANX_DATA_DIR": str(directory)}
    log = directory / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "phalanx", "scheduler", *options]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        until_s = time.monotonic() + 60
        while b"scheduler runs" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < until_s, log.read_text()
            time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()


def test_the_process_answers_on_its_port(database: str, tmp_path: Path) -> None:
    port = free_port()
    with scheduler(database, tmp_path, "--metrics-port", str(port)):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert "phalanx_scheduler_leads 1.0" in text and "process_resident_memory_bytes" in text


def test_the_process_listens_on_nothing_unless_it_is_told(database: str, tmp_path: Path) -> None:
    with scheduler(database, tmp_path) as pid:
        sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    assert not {f"socket:[{line[9]}]" for line in listening} & sockets


def test_a_port_that_cannot_be_had_is_one_line(database: str, tmp_path: Path) -> None:
    env = {"PHALANX_DATABASE_URL": database, "PHALANX_DATA_DIR": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ["--metrics-port", str(taken.getsockname()[1])]
        done = subprocess.run(
            [sys.executable, "-m", "phalanx", "scheduler", *options],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert "cannot serve metrics on 127.0.0.1:" in done.stderr and "Traceback" not in done.stderr
