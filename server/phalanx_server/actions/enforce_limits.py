"""Ask jobs to end whose time limit is reached. The limit counts from when all ranks of the attempt ran."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.expect_lease import expect_lease
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.attempt import StopCause
from phalanx_server.store.attempts import lock_attempts, overdue_attempts
from phalanx_server.store.leases import Lease
from phalanx_server.store.transactions import rerun_on_deadlock


@rerun_on_deadlock
async def enforce_limits(engine: AsyncEngine, lease: Lease, *, now: datetime) -> list[UUID]:
    """The jobs that were asked to end. Raises LeaseLost."""
    async with engine.connect() as conn:
        overdue = await overdue_attempts(conn, now=now)
    if not overdue:
        return []
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        return await request_stop(conn, await lock_attempts(conn, overdue), cause=StopCause.TIME_LIMIT, now=now)
