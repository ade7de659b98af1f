"""Tenants as they are looked at: with quotas and what their subtree uses of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.job_views import SUBTREE

# `usage` is what is charged to attempts of the tenant and of everything below it, counted as a pass counts it against
# quotas: of memory, each replica takes whole GiB; of a lost node, what may still run there.
_TENANTS = """
SELECT t.id, t.path, (SELECT path FROM tenants p WHERE p.id = t.parent_id) AS parent, t.weight, t.preemption, t.version,
       coalesce((
           SELECT jsonb_object_agg(q.resource, jsonb_build_object('nominal', q.nominal,
               'borrowing_limit', q.borrowing_limit, 'lending_limit', q.lending_limit))
           FROM quotas q WHERE q.tenant_id = t.id), '{{}}') AS quotas,
       coalesce((
           SELECT jsonb_object_agg(used.resource, used.amount) FROM (
               SELECT taken.resource, sum(taken.amount)::bigint AS amount
               FROM placements p JOIN nodes n ON n.id = p.node_id JOIN attempts a ON a.id = p.attempt_id
               JOIN jobs j ON j.id = a.job_id JOIN tenants o ON o.id = j.tenant_id
               CROSS JOIN LATERAL (VALUES
                   (n.gpu_type, cardinality(p.gpu_indices)), ('cpu', ceil(p.cpus)),
                   ('memory_gib', ceil(p.memory_bytes::float8 / p.replicas / 1073741824) * p.replicas)
               ) AS taken (resource, amount)
               WHERE p.released_at IS NULL AND (n.state <> 'lost' OR a.certain_at > now())
                 AND (o.path = t.path OR starts_with(o.path, t.path || '/'))
               GROUP BY taken.resource HAVING sum(taken.amount) > 0
           ) used), '{{}}') AS usage
FROM (SELECT * FROM tenants WHERE {conditions} ORDER BY path LIMIT :limit) t ORDER BY t.path
"""


async def list_tenants(conn: AsyncConnection, *, tenant: str | None, after: str | None, limit: int) -> list[Row[Any]]:
    """Tenants of the subtree `tenant` (None = all) by path, parents first, after the path `after`."""
    given = {SUBTREE: ("tenant", tenant), "path > :after": ("after", after)}
    used = {condition: bound for condition, bound in given.items() if bound[1] is not None}
    query = _TENANTS.format(conditions=" AND ".join(used) or "true")
    return list(await conn.execute(text(query), {**dict(used.values()), "limit": limit}))


async def load_tenant(conn: AsyncConnection, path: str) -> Row[Any] | None:
    query = _TENANTS.format(conditions="path = :path")
    return (await conn.execute(text(query), {"path": path, "limit": 1})).one_or_none()
