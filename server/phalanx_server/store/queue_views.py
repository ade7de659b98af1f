"""The queue as it is looked at: waiting jobs in the order in which a pass considers them, with positions.

Owns the order (priority, then age, then id: the index `jobs_queue`). A position counts the whole queue, whoever looks.
"""

from __future__ import annotations

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


_AFTER = """
    AND (q.priority < :priority
         OR q.priority = :priority AND (q.submitted_at, q.id) > (CAST(:submitted_at AS timestamptz), CAST(:id AS uuid)))
"""
_PAGE = """
SELECT p.position, j.id, j.name, t.path AS tenant, j.priority, j.submitted_at,
       (j.spec->'resources'->>'replicas')::int AS replicas,
       (j.spec->'resources'->>'gpus_per_replica')::int AS gpus_per_replica,
       h.reason AS hold_reason, h.message AS hold_message, h.unblocks, h.estimated_start, h.since AS hold_since
FROM (
    SELECT w.id, w.position FROM (
        SELECT q.id, q.tenant_id,
               :position + row_number() OVER (ORDER BY q.priority DESC, q.submitted_at, q.id) AS position
        FROM jobs q WHERE q.state = 'queued' {after}
    ) w {within} ORDER BY w.position LIMIT :limit
) p
JOIN jobs j ON j.id = p.id
JOIN tenants t ON t.id = j.tenant_id
LEFT JOIN holds h ON h.job_id = j.id
ORDER BY p.position
"""
_WITHIN = f"WHERE w.tenant_id IN (SELECT id FROM tenants WHERE {SUBTREE})"
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
    statement = _PAGE.format(after=_AFTER if after else "", within=_WITHIN if tenant is not None else "")
    return list(await conn.execute(text(statement), values))


async def position_in_queue(conn: AsyncConnection, job_id: UUID) -> int | None:
    """1 = next to be considered; None where the job does not wait."""
    return (await conn.execute(_POSITION, {"id": job_id})).scalar_one_or_none()
