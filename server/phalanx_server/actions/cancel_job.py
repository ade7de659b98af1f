"""Cancels a job, or the jobs of an array: at once where one waits; where it holds GPUs, its attempt is asked to stop,
and its end decides.

Owns the intent (`cancel_requested_at`). Asking again is harmless.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.end_waiting import Ending, end_waiting
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.access import Actor
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.errors import Conflict, NotFound
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import TERMINAL, JobState
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_alike
from phalanx_server.store.jobs import LockedJob, change_jobs, lock_array, lock_job
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify


@rerun_on_deadlock
async def cancel_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended otherwise."""
    async with engine.begin() as conn:
        job = await lock_job(conn, job_id)
        if job is None:
            raise NotFound(f"there is no job {ids.encode('job', job_id)}")
        if job.state in TERMINAL and job.state != JobState.CANCELLED:
            raise Conflict(f"{job.name} is already {job.state}; it cannot be cancelled any more")
        if await _cancel(conn, [job], actor, now):
            await record_audit(conn, actor, "cancel_job", ids.encode("job", job_id), {"state": job.state})


@rerun_on_deadlock
async def cancel_array(engine: AsyncEngine, array_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Cancel the jobs of an array that have not ended. Raises NotFound, and Conflict where all have."""
    async with engine.begin() as conn:
        jobs = await lock_array(conn, array_id)
        name = ids.encode("array", array_id)
        if not jobs:
            raise NotFound(f"there is no array {name}")
        if all(job.state in TERMINAL for job in jobs) and any(job.state != JobState.CANCELLED for job in jobs):
            raise Conflict(f"all jobs of {name} have ended; it cannot be cancelled any more")
        cancelled = await _cancel(conn, jobs, actor, now)
        if cancelled:
            await record_audit(conn, actor, "cancel_array", name, {"jobs": cancelled})


async def _cancel(conn: AsyncConnection, jobs: Sequence[LockedJob], actor: Actor, now: datetime) -> int:
    """Of locked jobs those that have not ended and were not asked to end before; how many."""
    open_ = [job for job in jobs if job.state not in TERMINAL and job.cancel_requested_at is None]
    await _cancel_live(conn, [job.id for job in open_ if job.state != JobState.QUEUED], actor, now)
    await _cancel_waiting(conn, [job for job in open_ if job.state == JobState.QUEUED], actor, now)
    if open_:
        await notify(conn, "queue", *(f"job:{job.id.hex}" for job in open_))
    return len(open_)


async def _cancel_waiting(conn: AsyncConnection, jobs: Sequence[LockedJob], actor: Actor, now: datetime) -> None:
    message = f"cancelled by {actor.name} before it started"
    ending = Ending(JobState.CANCELLED, "cancelled", message, {"cancel_requested_at": now})
    await end_waiting(conn, jobs, ending, now=now)


async def _cancel_live(conn: AsyncConnection, job_ids: Sequence[UUID], actor: Actor, now: datetime) -> None:
    """An attempt that stops for another reason already goes on stopping; that it is cancelled decides its end."""
    if not job_ids:
        return
    await change_jobs(conn, job_ids, {"cancel_requested_at": now})
    event = Event(at=now, kind=EventKind.CANCEL_REQUESTED, message=f"{actor.name} cancelled it.")
    await record_alike(conn, job_ids, event)
    await request_stop(conn, await lock_live_attempts(conn, job_ids), cause=StopCause.CANCEL, now=now)
