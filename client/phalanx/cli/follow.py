"""Following one job to its end: asks the server, woken by the job's events, and shows each state on a board.

It owns when to look and what an outage of the server means (nothing: the job goes on, so following does too). How a
job looks on the terminal is the board's business (`board.py`).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from phalanx.errors import ConnectionFailed, PhalanxError, Unavailable
from phalanx.models import Job
from phalanx.retry import OUTAGE_TOLERANCE_S

if TYPE_CHECKING:
    from phalanx.client import AsyncClient

POLL_S = 0.5
TOLD = frozenset({"environment"})  # kinds of events that the state of a job does not show


class Board(Protocol):
    """Where the state of a job is shown."""

    def show(self, job: Job) -> None: ...

    def note(self, text: str) -> None: ...

    def tell(self, text: str) -> None: ...


async def follow(client: AsyncClient, job_id: str, board: Board, *, poll_s: float = POLL_S) -> Job:
    """Show the job until it has ended, and answer it. An unreachable server is waited for OUTAGE_TOLERANCE_S."""
    changed = asyncio.Event()
    listener = asyncio.create_task(_listen(client, job_id, board, changed))
    heard_at = time.monotonic()
    try:
        while True:
            try:
                job = await client.job(job_id)
                heard_at = time.monotonic()
                board.show(job)
                if job.ended:
                    return job
            except (ConnectionFailed, Unavailable) as error:
                if time.monotonic() - heard_at > OUTAGE_TOLERANCE_S:
                    raise
                board.note(f"{error}; the job goes on, trying again")
            with suppress(TimeoutError):
                async with asyncio.timeout(poll_s):  # `wait_for` may lose a Ctrl-C that comes with a change
                    await changed.wait()
            changed.clear()
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)


async def _listen(client: AsyncClient, job_id: str, board: Board, changed: asyncio.Event) -> None:
    """Wake the follower on each event. Only a hint: without it the follower still looks every `poll_s`."""
    with suppress(PhalanxError):
        async for event in client.follow(job_id):
            if event.kind in TOLD:
                board.tell(event.message)
            changed.set()
    changed.set()
