"""Two real schedulers on one database: when the one that leads is killed, the other leads soon."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

START_TIMEOUT_S = 60.0
TAKEOVER_S = 10.0  # 5 s are promised; a busy machine may be late with a tick

LEADER = text("SELECT holder FROM leases WHERE name = 'scheduler' AND expires_at > clock_timestamp()")


@contextmanager
def scheduler(database: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "phalanx", "scheduler"],
            env={**os.environ, "PHALANX_DATABASE_URL": database},
            stdout=out,
            stderr=out,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def leader(engine: AsyncEngine, *, other_than: int | None, timeout_s: float) -> int:
    """The pid of the scheduler that leads, as soon as it is not `other_than`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        async with engine.connect() as conn:
            holder = (await conn.execute(LEADER)).scalar_one_or_none()
        pid = int(holder.rsplit("-", 2)[1]) if holder else None
        if pid not in (None, other_than):
            assert pid is not None
            return pid
        assert time.monotonic() < deadline_s, f"nobody else leads after {timeout_s:g} s"
        await asyncio.sleep(0.05)


async def test_the_other_scheduler_leads_when_the_first_is_killed(
    database: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    with scheduler(database, tmp_path / "a") as first, scheduler(database, tmp_path / "b") as second:
        pids = {first.pid: first, second.pid: second}
        leads = await leader(engine, other_than=None, timeout_s=START_TIMEOUT_S)
        (waits,) = pids.keys() - {leads}
        log = tmp_path / ("b" if waits == second.pid else "a")
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while b"scheduler runs" not in log.read_bytes():
            assert time.monotonic() < deadline_s and pids[waits].poll() is None, log.read_text()
            await asyncio.sleep(0.05)
        pids[leads].kill()
        assert await leader(engine, other_than=leads, timeout_s=TAKEOVER_S) == waits
