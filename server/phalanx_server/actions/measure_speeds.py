"""Measures how fast running elastic jobs are with the replicas that they have.

Owns the transaction: two statements for any number of jobs, and a third when passes are told something else of some.
Whoever measures need not lead, as the store takes a later reading only.
"""

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.speed import SETTLE_S, Measured, measure
from phalanx_server.store.speeds import running_elastic, write_speeds


async def measure_speeds(engine: AsyncEngine) -> list[UUID]:
    """The jobs of which something new was read."""
    async with engine.begin() as conn:
        seen = await running_elastic(conn, settle_s=SETTLE_S)
        known = [(each, measure(each.before, each.reading)) for each in seen]
        told_anew = [each.place.job_id for each, now in known if _told(now) != _told(each.before)]
        rows = [(each.place, now) for each, now in known if now is not None]
        await write_speeds(conn, rows, told_anew=told_anew)
    return [each.place.job_id for each in seen]


def _told(known: Measured | None) -> float | None:
    return known.speed if known else None
