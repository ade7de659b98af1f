"""Cancels a job: at once where it waits; where it holds GPUs, its attempt is asked to stop, and its end decides.

Owns the intent (`cancel_requested_at`). Asking again is harmless.
"""

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.access import Actor
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.errors import Conflict, NotFound
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import TERMINAL, JobState, advance
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.holds import delete_holds
from phalanx_server.store.jobs import LockedJob, change_job, lock_job
from phalanx_server.store.outbox import Notice, post_notices
from phalanx_server.store.wakeups import notify


async def cancel_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended otherwise."""
    async with engine.begin() as conn:
        job = await lock_job(conn, job_id)
        if job is None:
            raise NotFound(f"there is no job {ids.encode('job', job_id)}")
        if job.state == JobState.CANCELLED or job.cancel_requested_at is not None:
            return
        if job.state in TERMINAL:
            raise Conflict(f"{job.name} is already {job.state}; it cannot be cancelled any more")
        if job.state == JobState.QUEUED:
            await _cancel_waiting(conn, job, actor, now)
        else:
            await _cancel_live(conn, job, actor, now)
        await record_audit(conn, actor, "cancel_job", ids.encode("job", job_id), {"state": job.state})
        await notify(conn, "queue", f"job:{job_id.hex}")


async def _cancel_waiting(conn: AsyncConnection, job: LockedJob, actor: Actor, now: datetime) -> None:
    state = advance(JobState(job.state), JobState.CANCELLED)
    message = f"cancelled by {actor.name} before it started"
    values = {"state": state, "cancel_requested_at": now, "finished_at": now, "reason": "cancelled", "message": message}
    await change_job(conn, job.id, values)
    await delete_holds(conn, [job.id])
    told = f"C{message[1:]}."
    await record_events(conn, [Event(at=now, kind=EventKind.CANCELLED, message=told, job_id=job.id)])
    payload = {
        "job_id": ids.encode("job", job.id),
        "name": job.name,
        "tenant": job.tenant,
        "state": state.value,
        "attempt": job.attempts,
        "message": message,
        "at": now.isoformat().replace("+00:00", "Z"),
    }
    await post_notices(conn, [Notice("job.cancelled", payload)], now=now)


async def _cancel_live(conn: AsyncConnection, job: LockedJob, actor: Actor, now: datetime) -> None:
    """An attempt that stops for another reason already goes on stopping; that it is cancelled decides its end."""
    await change_job(conn, job.id, {"cancel_requested_at": now})
    message = f"{actor.name} cancelled it."
    await record_events(conn, [Event(at=now, kind=EventKind.CANCEL_REQUESTED, message=message, job_id=job.id)])
    await request_stop(conn, await lock_live_attempts(conn, [job.id]), cause=StopCause.CANCEL, now=now)
