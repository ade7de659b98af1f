"""Puts a job, or the jobs of an array, on hold, and releases them: a held job is not started, one that runs goes on.

Owns the intent (`held`). Doing it twice is harmless.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.open_jobs import open_jobs, open_jobs_of_array
from phalanx_server.domain.access import Actor
from phalanx_server.domain.event import EventKind
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_alike
from phalanx_server.store.jobs import LockedJob, change_jobs
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify


@rerun_on_deadlock
async def hold_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended."""
    async with engine.begin() as conn:
        await _set_held(conn, *await open_jobs(conn, job_id), held=True, actor=actor, now=now)


@rerun_on_deadlock
async def release_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended."""
    async with engine.begin() as conn:
        await _set_held(conn, *await open_jobs(conn, job_id), held=False, actor=actor, now=now)


@rerun_on_deadlock
async def hold_array(engine: AsyncEngine, array_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for an array whose jobs have all ended."""
    async with engine.begin() as conn:
        await _set_held(conn, *await open_jobs_of_array(conn, array_id), held=True, actor=actor, now=now)


@rerun_on_deadlock
async def release_array(engine: AsyncEngine, array_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for an array whose jobs have all ended."""
    async with engine.begin() as conn:
        await _set_held(conn, *await open_jobs_of_array(conn, array_id), held=False, actor=actor, now=now)


async def _set_held(
    conn: AsyncConnection, name: str, jobs: Sequence[LockedJob], *, held: bool, actor: Actor, now: datetime
) -> None:
    job_ids = [job.id for job in jobs if job.held != held]
    if not job_ids:
        return
    await change_jobs(conn, job_ids, {"held": held})
    message = f"{'Put on hold' if held else 'Released'} by {actor.name}."
    kind = EventKind.HELD if held else EventKind.RELEASED
    await record_alike(conn, job_ids, Event(at=now, kind=kind, message=message))
    await record_audit(conn, actor, "hold_job" if held else "release_job", name)
    await notify(conn, "queue", *(f"job:{job_id.hex}" for job_id in job_ids))
