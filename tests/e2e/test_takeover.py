"""Two real schedulers on one database: when the one that leads is killed, the other leads within 5 s."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from phalanx_server.settings import Settings
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

START_TIMEOUT_S = 60.0
TAKEOVER_S = 5.0

LEADER = text("SELECT holder, expires_at FROM leases WHERE name = 'scheduler' AND expires_at > clock_timestamp()")
NOW = text("SELECT clock_timestamp()")


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


async def leader(engine: AsyncEngine, *, other_than: int | None) -> tuple[int, datetime]:
    """The pid of the scheduler that leads, as soon as it is not `other_than`, and until when, by the database."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        async with engine.connect() as conn:
            row = (await conn.execute(LEADER)).one_or_none()
        if row is not None and (pid := int(row.holder.rsplit("-", 2)[1])) != other_than:
            return pid, row.expires_at
        assert time.monotonic() < deadline_s, f"nobody else leads after {START_TIMEOUT_S:g} s"
        await asyncio.sleep(0.05)


async def test_the_other_scheduler_leads_when_the_first_is_killed(
    database: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    with scheduler(database, tmp_path / "a") as first, scheduler(database, tmp_path / "b") as second:
        pids = {first.pid: first, second.pid: second}
        leads, _ = await leader(engine, other_than=None)
        (waits,) = pids.keys() - {leads}
        log = tmp_path / ("b" if waits == second.pid else "a")
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while b"scheduler runs" not in log.read_bytes():
            assert time.monotonic() < deadline_s and pids[waits].poll() is None, log.read_text()
            await asyncio.sleep(0.05)
        async with engine.connect() as conn:
            killed_at = (await conn.execute(NOW)).scalar_one()
        pids[leads].kill()
        took_over, until = await leader(engine, other_than=leads)
        took_over_at = until - timedelta(seconds=Settings.model_fields["lease_ttl_s"].default)
        assert took_over == waits
        assert (took_over_at - killed_at).total_seconds() < TAKEOVER_S
