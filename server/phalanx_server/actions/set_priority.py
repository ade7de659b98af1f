"""Changes the priority of a job, or of the jobs of an array, whether they wait or run.

Owns the one column. What was asked for at the submit stays in the spec.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.open_jobs import open_jobs, open_jobs_of_array
from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import priority_of
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_alike
from phalanx_server.store.jobs import LockedJob, change_jobs
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify


@rerun_on_deadlock
async def set_priority(engine: AsyncEngine, job_id: UUID, given: str | int, *, actor: Actor, now: datetime) -> None:
    """Raises Invalid, NotFound, and Conflict for a job that has ended."""
    priority = _checked(given)
    async with engine.begin() as conn:
        await _set(conn, *await open_jobs(conn, job_id), priority, actor=actor, now=now)


@rerun_on_deadlock
async def set_array_priority(
    engine: AsyncEngine, array_id: UUID, given: str | int, *, actor: Actor, now: datetime
) -> None:
    """Raises Invalid, NotFound, and Conflict for an array whose jobs have all ended."""
    priority = _checked(given)
    async with engine.begin() as conn:
        await _set(conn, *await open_jobs_of_array(conn, array_id), priority, actor=actor, now=now)


def _checked(given: str | int) -> int:
    try:
        return priority_of(given)
    except ValueError as error:
        raise Invalid.field("priority", str(error)) from None


async def _set(
    conn: AsyncConnection, name: str, jobs: Sequence[LockedJob], priority: int, *, actor: Actor, now: datetime
) -> None:
    changed = [job for job in jobs if job.priority != priority]
    if not changed:
        return
    await change_jobs(conn, [job.id for job in changed], {"priority": priority})
    for before in {job.priority for job in changed}:
        message = f"{actor.name} changed its priority from {before} to {priority}."
        event = Event(at=now, kind=EventKind.PRIORITY, message=message, data={"from": before, "to": priority})
        await record_alike(conn, [job.id for job in changed if job.priority == before], event)
    await record_audit(conn, actor, "set_priority", name, {"priority": priority, "jobs": len(changed)})
    await notify(conn, "queue", *(f"job:{job.id.hex}" for job in changed))
