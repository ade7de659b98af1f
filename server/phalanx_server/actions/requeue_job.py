"""Puts a running job, or those of an array, back into the queue: the attempt is asked to stop, and its end uses up no
retry.

Owns what is refused. Asking again is harmless.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.open_jobs import open_jobs, open_jobs_of_array
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.access import Actor
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.errors import Conflict
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import JobState
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_alike
from phalanx_server.store.jobs import LockedJob
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

# What stops for these will not be queued again.
_FINAL = frozenset({StopCause.CANCEL.value, StopCause.TIME_LIMIT.value})


@rerun_on_deadlock
async def requeue_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that waits, that has ended or is about to."""
    async with engine.begin() as conn:
        name, (job,) = await open_jobs(conn, job_id)
        if job.state == JobState.QUEUED:
            raise Conflict(f"{job.name} waits already: there is nothing to put back")
        if job.cancel_requested_at is not None:
            raise Conflict(f"{job.name} is being cancelled")
        (attempt,) = await lock_live_attempts(conn, [job_id])
        if attempt.stop_cause in _FINAL:
            raise Conflict(f"{job.name} is being ended already ({attempt.stop_cause})")
        await _requeue(conn, name, [job], actor, now)


@rerun_on_deadlock
async def requeue_array(engine: AsyncEngine, array_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Put back the jobs that run. Raises NotFound, and Conflict for an array whose jobs have all ended."""
    async with engine.begin() as conn:
        name, jobs = await open_jobs_of_array(conn, array_id)
        running = [job for job in jobs if job.state != JobState.QUEUED and job.cancel_requested_at is None]
        await _requeue(conn, name, running, actor, now)


async def _requeue(conn: AsyncConnection, name: str, jobs: Sequence[LockedJob], actor: Actor, now: datetime) -> None:
    """Attempts that stop for another reason already go on doing so."""
    attempts = await lock_live_attempts(conn, [job.id for job in jobs])
    asked = [row for row in attempts if row.stop_cause is None]
    if not asked:
        return
    job_ids = [row.job_id for row in asked]
    message = f"{actor.name} put it back into the queue."
    await record_alike(conn, job_ids, Event(at=now, kind=EventKind.REQUEUE_REQUESTED, message=message))
    await request_stop(conn, asked, cause=StopCause.REQUEUE, now=now)
    await record_audit(conn, actor, "requeue_job", name, {"jobs": len(asked)})
    await notify(conn, "queue")
