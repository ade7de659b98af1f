"""Ask live attempts to end: by cancel, time limit, drain or for the plan.

Owns the step from running to stopping. The agent ends the ranks; what the end means is decided when it reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.attempt_change import AttemptChange, write
from phalanx_server.domain.attempt import StopCause

MESSAGES = {
    StopCause.CANCEL: "Cancel was requested; its ranks are being ended.",
    StopCause.TIME_LIMIT: "Its time limit is reached; its ranks are being ended.",
    StopCause.DRAIN: "Its node is being drained; its ranks are being ended.",
    StopCause.REQUEUE: "It is put back into the queue; its ranks are being ended.",
    StopCause.PREEMPTION: "It gives way to another job; its ranks are being ended.",
    StopCause.RESIZE: "It goes on with another number of replicas; its ranks are being ended.",
    StopCause.MIGRATION: "It goes on elsewhere; its ranks are being ended.",
}


async def request_stop(
    conn: AsyncConnection, rows: Sequence[Row[Any]], *, cause: StopCause, now: datetime
) -> list[UUID]:
    """Stop these attempts (locked rows of store.attempts), with the grace that each job asked for; the jobs of those
    that were not asked before.

    One that is over stays as it is, and asking again changes nothing; a cancel overrules any earlier cause. Runs in the
    caller's transaction.
    """
    changes = [AttemptChange(row, now) for row in rows]
    for change in changes:
        change.stop(cause, grace_s=change.row.spec["preemption"]["grace"], message=MESSAGES[cause])
    await write(conn, changes, now=now)
    return [change.row.job_id for change in changes if change.attempt]
