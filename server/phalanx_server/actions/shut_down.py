"""Puts every job that runs back into the queue because Phalanx itself is about to be stopped.

Owns what is asked of the attempts: as of a requeue, so no retry is used up. The caller keeps the scheduler from
starting them again, and the agent until it has reported their ends.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.attempt_change import AttemptChange, StopOrder, write
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.stop import SHUTDOWN
from phalanx_server.store.attempts import lock_all_live_attempts
from phalanx_server.store.transactions import rerun_on_deadlock

MESSAGE = "Phalanx is being stopped; its ranks are being ended."


@rerun_on_deadlock
async def shut_down(engine: AsyncEngine, *, grace_most_s: float, now: datetime) -> list[str]:
    """The names of the jobs whose attempts are to end: each has the grace of its job, `grace_most_s` at most, but for
    those that were ending for another reason already, which go on doing so."""
    async with engine.begin() as conn:
        changes = [AttemptChange(row, now) for row in await lock_all_live_attempts(conn)]
        for change in changes:
            grace_s = min(change.row.spec["preemption"]["grace"], grace_most_s)
            order = StopOrder(columns={"stop_reason": SHUTDOWN})
            change.stop(StopCause.REQUEUE, grace_s=grace_s, message=MESSAGE, order=order)
        await write(conn, changes, now=now)
    return [change.row.job_name for change in changes]
