"""How many jobs there are, and which are open, for monitoring.

Counts only what partial indexes hold (jobs that are not over), so that a scrape costs the same with a million old ones.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import holds, jobs

_LIVE = ("starting", "running", "stopping")


async def count_jobs(conn: AsyncConnection) -> dict[str, int]:
    """Jobs that are not over, by state; every such state is there, with 0 where there is none."""
    live = select(jobs.c.state, func.count().label("number")).where(jobs.c.state.in_(_LIVE)).group_by(jobs.c.state)
    queued = select(func.count()).where(jobs.c.state == "queued")
    counts = {row.state: row.number for row in await conn.execute(live)}
    return {"queued": (await conn.execute(queued)).scalar_one(), **{state: counts.get(state, 0) for state in _LIVE}}


async def names_of_open_jobs(conn: AsyncConnection) -> list[str]:
    """The names of all jobs that are not over, oldest first."""
    open_jobs = select(jobs.c.name).where(jobs.c.state.in_(("queued", *_LIVE))).order_by(jobs.c.id)
    return list((await conn.execute(open_jobs)).scalars())


async def count_queue(conn: AsyncConnection) -> dict[str, int]:
    """Holds by reason. A queued job that no pass has looked at yet has none."""
    rows = await conn.execute(select(holds.c.reason, func.count().label("number")).group_by(holds.c.reason))
    return {row.reason: row.number for row in rows}
