"""Enforce time limits. A limit is on all attempts of a job together, each counted from when all its ranks ran
(docs/decisions/0021).

Attempts that run are asked to end. A job that waits with nothing left fails at once: its limit was reached while its
last attempt was ending for another reason, or the policy's default has become shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.end_waiting import Ending, end_waiting
from phalanx_server.actions.expect_lease import expect_lease
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.attempt import OUT_OF_TIME, Outcome, StopCause
from phalanx_server.domain.job import JobState
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.attempts import lock_attempts
from phalanx_server.store.jobs import lock_waiting_jobs
from phalanx_server.store.leases import Lease
from phalanx_server.store.policies import load_policy
from phalanx_server.store.time_limits import overdue_attempts, used_up_jobs
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

_USED_UP = Ending(JobState.FAILED, Outcome.TIME_LIMIT, OUT_OF_TIME)


async def enforce_limits(engine: AsyncEngine, lease: Lease, *, base: Policy, now: datetime) -> list[UUID]:
    """The jobs that failed, and those that were asked to end. `base` is the policy of the settings file. Raises
    LeaseLost."""
    async with engine.connect() as conn:
        default_s = (await load_policy(conn)).over(base).default_time_limit_s
        overdue = await overdue_attempts(conn, default_s=default_s, now=now)
        used_up = await used_up_jobs(conn, default_s=default_s)
    failed = await _fail(engine, lease, used_up, now) if used_up else []
    return failed + (await _stop(engine, lease, overdue, now) if overdue else [])


@rerun_on_deadlock
async def _fail(engine: AsyncEngine, lease: Lease, job_ids: Sequence[UUID], now: datetime) -> list[UUID]:
    """Those of these jobs that still wait."""
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        failed = await end_waiting(conn, await lock_waiting_jobs(conn, job_ids), _USED_UP, now=now)
        await notify(conn, "queue", *(f"job:{job_id.hex}" for job_id in failed))
    return failed


@rerun_on_deadlock
async def _stop(engine: AsyncEngine, lease: Lease, attempt_ids: Sequence[UUID], now: datetime) -> list[UUID]:
    """The jobs of those of these attempts that still run."""
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        attempts = await lock_attempts(conn, attempt_ids)
        return await request_stop(conn, attempts, cause=StopCause.TIME_LIMIT, now=now)
