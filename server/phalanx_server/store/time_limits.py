"""Time limits: how long the attempts of a job ran, and which jobs have used up what they may.

Owns the SQL of both (docs/decisions/0021). A pass counts in the same way: `scheduling.snapshot.time_limit_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

DONE_S = """
    CASE WHEN j.attempts > 0 THEN (
        SELECT CAST(sum(extract(epoch FROM past.ended_at - past.started_at)) AS double precision)
        FROM attempts past WHERE past.job_id = j.id AND past.ended_at IS NOT NULL
    ) END
"""
"""How long all ranks ran in those attempts of the job `j` that are over, however they ended; null: in none."""

# What a job asked for, else what the policy says.
_LIMIT_S = "coalesce(CAST(j.spec->>'time_limit' AS double precision), CAST(:default_s AS double precision))"
# Most attempts are the first of their job: nothing is looked up for them.
LEFT_S = f"{_LIMIT_S} - CASE WHEN a.number > 1 THEN coalesce({DONE_S}, 0) ELSE 0 END"
"""How long the attempt `a` of the job `j` may run: what earlier ones left of its limit, or of `:default_s` where it
names none; null: for ever."""

_OVERDUE = text(
    f"""
    SELECT a.id FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.state IN ('starting', 'running') AND a.started_at IS NOT NULL AND {_LIMIT_S} IS NOT NULL
      AND a.started_at + make_interval(secs => {LEFT_S}) <= :now
    """
)
# By `jobs_tried`: few of those that wait have run before.
_USED_UP = text(f"SELECT j.id FROM jobs j WHERE j.state = 'queued' AND j.attempts > 0 AND {_LIMIT_S} <= {DONE_S}")
_USED_UP_OF = text(f"SELECT j.id FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND {_LIMIT_S} <= {DONE_S}")


async def overdue_attempts(conn: AsyncConnection, *, default_s: float | None, now: datetime) -> list[UUID]:
    """Attempts that run for longer than earlier ones left of their job's time limit, and were not asked to end.
    `default_s`: the limit of jobs that name none."""
    return list((await conn.execute(_OVERDUE, {"default_s": default_s, "now": now})).scalars())


async def used_up_jobs(conn: AsyncConnection, *, default_s: float | None) -> list[UUID]:
    """Waiting jobs whose attempts have used up their time limit."""
    return list((await conn.execute(_USED_UP, {"default_s": default_s})).scalars())


async def used_up_of(conn: AsyncConnection, job_ids: Sequence[UUID], *, default_s: float | None) -> set[UUID]:
    """Those of these jobs whose attempts have used up their time limit."""
    return set((await conn.execute(_USED_UP_OF, {"ids": list(job_ids), "default_s": default_s})).scalars())
