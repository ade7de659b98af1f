"""How many jobs there are that are not over: for monitoring, and for what `phalanx up` says of them.

Looks only at what partial indexes hold, so that it costs the same with a million old ones.
"""

from __future__ import annotations

from sqlalchemy import func, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import holds, jobs

_LIVE = ("starting", "running", "stopping")


async def count_jobs(conn: AsyncConnection) -> dict[str, int]:
    """Jobs that are not over, by state; every such state is there, with 0 where there is none."""
    live = select(jobs.c.state, func.count().label("number")).where(jobs.c.state.in_(_LIVE)).group_by(jobs.c.state)
    queued = select(func.count()).where(jobs.c.state == "queued")
    counts = {row.state: row.number for row in await conn.execute(live)}
    return {"queued": (await conn.execute(queued)).scalar_one(), **{state: counts.get(state, 0) for state in _LIVE}}


async def open_jobs_that_ran(conn: AsyncConnection, *, most: int) -> tuple[list[str], int]:
    """Of the jobs that are not over and have been started at least once: the names of the `most` oldest, and how many
    there are."""
    live = select(jobs.c.id, jobs.c.name).where(jobs.c.state.in_(_LIVE))
    tried = select(jobs.c.id, jobs.c.name).where(jobs.c.state == "queued", jobs.c.attempts > 0)
    ran = union_all(live, tried).subquery()
    query = select(ran.c.name, func.count().over().label("number")).order_by(ran.c.id).limit(most)
    rows = (await conn.execute(query)).all()
    return [row.name for row in rows], rows[0].number if rows else 0


async def count_queue(conn: AsyncConnection) -> dict[str, int]:
    """Holds by reason. A queued job that no pass has looked at yet has none."""
    rows = await conn.execute(select(holds.c.reason, func.count().label("number")).group_by(holds.c.reason))
    return {row.reason: row.number for row in rows}
