"""Puts a job on hold, and releases it: a held job is not started, one that runs goes on running.

Owns the intent (`held`). Doing it twice is harmless.
"""

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, NotFound
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import TERMINAL
from phalanx_server.store import ids
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.jobs import change_job, lock_job
from phalanx_server.store.wakeups import notify


async def hold_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended."""
    await _set_held(engine, job_id, held=True, actor=actor, now=now)


async def release_job(engine: AsyncEngine, job_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and Conflict for a job that has ended."""
    await _set_held(engine, job_id, held=False, actor=actor, now=now)


async def _set_held(engine: AsyncEngine, job_id: UUID, *, held: bool, actor: Actor, now: datetime) -> None:
    name = ids.encode("job", job_id)
    kind = EventKind.HELD if held else EventKind.RELEASED
    async with engine.begin() as conn:
        job = await lock_job(conn, job_id)
        if job is None:
            raise NotFound(f"there is no job {name}")
        if job.state in TERMINAL:
            raise Conflict(f"{job.name} is already {job.state}")
        if job.held == held:
            return
        await change_job(conn, job_id, {"held": held})
        message = f"{'Put on hold' if held else 'Released'} by {actor.name}."
        await record_events(conn, [Event(at=now, kind=kind, message=message, job_id=job_id)])
        await record_audit(conn, actor, "hold_job" if held else "release_job", name)
        await notify(conn, "queue", f"job:{job_id.hex}")
