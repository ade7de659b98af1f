"""The queue as it is looked at: waiting jobs in the order in which a pass considers them, with positions.

Owns the order (priority, then age, then id: the index `jobs_queue`). A position counts the whole queue, whoever looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.job_views import SUBTREE


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where a page ended: the keys of its last job, and that job's position."""

    priority: int
    submitted_at: datetime
    id: UUID
    position: int


_WAITING = "SELECT q.id, q.tenant_id, q.priority, q.submitted_at FROM jobs q WHERE q.state = 'queued'"
_ORDER = "priority DESC, submitted_at, id"
# What follows a place is two ranges of the index: with OR, everything before the place would be read again.
_SAME_PRIORITY = f"""{_WAITING} AND q.priority = :priority
    AND (q.submitted_at, q.id) > (CAST(:submitted_at AS timestamptz), CAST(:id AS uuid))"""
_LOWER = f"{_WAITING} AND q.priority < :priority"
_NUMBERED = f"SELECT next.*, :position + row_number() OVER (ORDER BY {_ORDER}) AS position FROM"


def _all(ranges: Sequence[str]) -> str:
    """Everybody's jobs: each range stops at the limit, and what is left is numbered."""
    cut = " UNION ALL ".join(f"({waiting} ORDER BY {_ORDER} LIMIT :limit)" for waiting in ranges)
    return f"{_NUMBERED} (SELECT * FROM ({cut}) w ORDER BY {_ORDER} LIMIT :limit) next"


def _within(ranges: Sequence[str]) -> str:
    """A subtree's jobs: all are numbered on the way, because positions are those of the whole queue."""
    return f"""
        SELECT * FROM ({_NUMBERED} ({" UNION ALL ".join(ranges)}) next) numbered
        WHERE tenant_id = ANY(ARRAY(SELECT id FROM tenants WHERE {SUBTREE})) ORDER BY {_ORDER} LIMIT :limit
    """


_PAGE = """
SELECT p.position, p.id, j.name, t.path AS tenant, p.priority, p.submitted_at,
       (j.spec->'resources'->>'replicas')::int AS replicas,
       (j.spec->'resources'->>'gpus_per_replica')::int AS gpus_per_replica, j.array_id, j.array_index,
       j.spec->'array' AS array,
       h.reason AS hold_reason, h.message AS hold_message, h.unblocks, h.estimated_start, h.since AS hold_since,
       h.estimated_start_low, h.estimated_start_high
FROM ({chosen}) p
JOIN jobs j ON j.id = p.id
JOIN tenants t ON t.id = p.tenant_id
LEFT JOIN holds h ON h.job_id = p.id
ORDER BY p.position
"""
_POSITION = text(
    """
    SELECT 1 + (SELECT count(*) FROM jobs q WHERE q.state = 'queued' AND q.priority > j.priority)
             + (SELECT count(*) FROM jobs q WHERE q.state = 'queued' AND q.priority = j.priority
                AND (q.submitted_at, q.id) < (j.submitted_at, j.id))
    FROM jobs j WHERE j.id = :id AND j.state = 'queued'
    """
)


async def list_queue(
    conn: AsyncConnection, *, tenant: str | None, after: QueuePlace | None, limit: int
) -> list[Row[Any]]:
    """At most `limit` waiting jobs of the subtree `tenant` (None = of all), first in the queue first."""
    values: dict[str, Any] = {"limit": limit, "position": 0}
    if after is not None:
        values |= {
            "priority": after.priority,
            "submitted_at": after.submitted_at,
            "id": after.id,
            "position": after.position,
        }
    if tenant is not None:
        values["tenant"] = tenant
    ranges = (_SAME_PRIORITY, _LOWER) if after else (_WAITING,)
    chosen = _all(ranges) if tenant is None else _within(ranges)
    return list(await conn.execute(text(_PAGE.format(chosen=chosen)), values))


async def position_in_queue(conn: AsyncConnection, job_id: UUID) -> int | None:
    """1 = next to be considered; None where the job does not wait."""
    return (await conn.execute(_POSITION, {"id": job_id})).scalar_one_or_none()
