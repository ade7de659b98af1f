"""What becomes of jobs when `phalanx up` stops, and when it starts again on the same data.

Owns the words for it, and how long ranks may take to end. It goes to the database, past the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.shut_down import shut_down
from phalanx_server.store.engine import create_engine
from phalanx_server.store.job_counts import count_jobs, open_jobs_that_ran
from phalanx_server.up_data import console

GRACE_MOST_S = 15.0
"""Whoever stops all of Phalanx waits for it: so less than a job may ask for."""
REPORT_S = 10.0
"""What a node may take after the grace: for the last output (2 s), output files (5 s), and to report it."""
POLL_S = 0.1
POLLS = round((GRACE_MOST_S + REPORT_S) / POLL_S)
NAMED_MOST = 5


@asynccontextmanager
async def _database(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


async def taken_up(url: str) -> str:
    """What to say at the start of the jobs that have run and not ended; "" where there is none."""
    async with _database(url) as engine, engine.connect() as conn:
        names, number = await open_jobs_that_ran(conn, most=NAMED_MOST)
    return f"Taken up again, as not ended before: {_some(names, number)}; `phalanx jobs` shows them" if names else ""


async def end_attempts(url: str, *, hurry: Callable[[], bool]) -> None:
    """Put what runs back into the queue, and wait until its ranks have ended, or nobody wants to wait any more."""
    async with _database(url) as engine:
        names = await shut_down(engine, grace_most_s=GRACE_MOST_S, now=datetime.now(UTC))
        if names:
            console.print(stopped(names), soft_wrap=True, markup=False)
        for _ in range(POLLS):
            if hurry() or not await _running(engine):
                return
            await asyncio.sleep(POLL_S)


def stopped(names: Sequence[str]) -> str:
    """What to say of the jobs that have ranks at the stop."""
    return (
        f"Stopping {_some(names, len(names))}: the next `phalanx up` on this data goes on from the last checkpoints,"
        f" except for those that were ending already. Ranks have {GRACE_MOST_S:.0f} s to save and end; another Ctrl-C"
        " does not wait for them"
    )


async def _running(engine: AsyncEngine) -> bool:
    async with engine.connect() as conn:
        counts = await count_jobs(conn)
    return sum(counts.values()) > counts["queued"]


def _some(names: Sequence[str], number: int) -> str:
    more = ", …" if number > NAMED_MOST else ""
    return f"{number} job{'' if number == 1 else 's'} ({', '.join(names[:NAMED_MOST])}{more})"
