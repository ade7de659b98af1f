"""Ask live attempts to end: by cancel, time limit or drain.

Owns the step from running to stopping. The agent ends the ranks; what the end means is decided when it reports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.attempt_change import AttemptChange, write
from phalanx_server.domain.attempt import StopCause
from phalanx_server.store.attempts import lock_live_attempts

MESSAGES = {
    StopCause.CANCEL: "Cancel was requested; its ranks are being ended.",
    StopCause.TIME_LIMIT: "Its time limit is reached; its ranks are being ended.",
    StopCause.DRAIN: "Its node is being drained; its ranks are being ended.",
    StopCause.PREEMPTION: "It gives way to another job; its ranks are being ended.",
}


async def request_stop(
    conn: AsyncConnection, *, job_ids: Iterable[UUID], cause: StopCause, now: datetime, message: str | None = None
) -> list[UUID]:
    """Stop the live attempts of these jobs, with the grace that each job asked for; the jobs that have one.

    Asking again changes nothing; a cancel overrules any earlier cause. Runs in the caller's transaction.
    """
    changes = [AttemptChange(row, now) for row in await lock_live_attempts(conn, job_ids)]
    for change in changes:
        grace_s = change.row.spec["preemption"]["grace"]
        change.stop(cause, grace_s=grace_s, message=message or MESSAGES[cause])
    await write(conn, changes, now=now)
    return [change.row.job_id for change in changes]
