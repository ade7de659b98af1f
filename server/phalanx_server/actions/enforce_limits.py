"""Ask jobs to end whose time limit is reached. The limit counts from when all ranks of the attempt ran."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.attempt import StopCause
from phalanx_server.store.attempts import overdue_jobs


async def enforce_limits(engine: AsyncEngine, *, now: datetime) -> list[UUID]:
    """The jobs that were asked to end."""
    async with engine.begin() as conn:
        jobs = await overdue_jobs(conn, now=now)
        return await request_stop(conn, job_ids=jobs, cause=StopCause.TIME_LIMIT, now=now) if jobs else []
