"""Events of a job as they are looked at and followed.

Owns one subtlety: ids are given before commit, so an event may appear after one with a larger id. A follower that goes
on from the largest id it saw would miss it; so each row says whether it is `settled` (nothing older can still appear).
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

# A row is settled when the transaction that wrote it is older than every one still in progress.
SETTLED = "age(e.xmin) > age(pg_snapshot_xmin(pg_current_snapshot())::xid)"

_EVENTS = text(
    f"""
    SELECT e.id, e.kind, e.at, e.message, e.data, e.attempt_id, n.name AS node, {SETTLED} AS settled
    FROM events e LEFT JOIN nodes n ON n.id = e.node_id
    WHERE e.job_id = :job_id AND e.id > :after
    ORDER BY e.id LIMIT :limit
    """
)


async def list_events(conn: AsyncConnection, job_id: UUID, *, after: int, limit: int) -> list[Row[Any]]:
    """Events of a job with ids above `after`, oldest first."""
    return list(await conn.execute(_EVENTS, {"job_id": job_id, "after": after, "limit": limit}))


_NAMED_RANK = text(
    """
    SELECT CAST(e.data ->> 'named_rank' AS integer) FROM events e
    WHERE e.job_id = :job_id AND e.attempt_id = :attempt_id AND e.kind = 'attempt_ended'
    ORDER BY e.id DESC LIMIT 1
    """
)


async def load_named_rank(conn: AsyncConnection, job_id: UUID, attempt_id: UUID) -> int | None:
    """The rank that the message of an attempt's end tells of; None if of none, or if that event is forgotten."""
    return await conn.scalar(_NAMED_RANK, {"job_id": job_id, "attempt_id": attempt_id})
