"""Arrays as they are looked at: what is common to their jobs, and how many are in which state.

Owns the read side of arrays. Refuses to decide who may look.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

# What all jobs of an array have alike is read from one of them.
_ARRAY = text(
    """
    SELECT j.array_id AS id, j.spec->>'name' AS name, t.path AS tenant, j.spec, j.created_by, j.submitted_at,
           (SELECT jsonb_object_agg(counted.state, counted.jobs) FROM (
               SELECT state, count(*) AS jobs FROM jobs WHERE array_id = :id GROUP BY state) counted) AS states,
           (SELECT count(*) FROM jobs WHERE array_id = :id AND held AND state = 'queued') AS held
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    WHERE j.array_id = :id ORDER BY j.array_index LIMIT 1
    """
)
_TENANT_OF = text("SELECT t.path FROM jobs j JOIN tenants t ON t.id = j.tenant_id WHERE j.array_id = :id LIMIT 1")


async def load_array(conn: AsyncConnection, array_id: UUID) -> Row[Any] | None:
    return (await conn.execute(_ARRAY, {"id": array_id})).one_or_none()


async def tenant_of_array(conn: AsyncConnection, array_id: UUID) -> str | None:
    """The path of the tenant that an array belongs to; None where there is no such array."""
    return (await conn.execute(_TENANT_OF, {"id": array_id})).scalar_one_or_none()
