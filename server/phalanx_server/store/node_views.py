"""Nodes as they are looked at: with their cluster, the GPUs charged on them and the jobs that run there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.draining import Occupant
from phalanx_server.store.job_views import SUBTREE
from phalanx_server.store.time_limits import LEFT_S

SUSPECT_HOURS = 24
"""What checks found longer ago says nothing of a node any more."""

SUSPECT_EVENTS = 200
"""So many of the newest are looked at: a job may cause any number."""

_NODES = """
SELECT n.id, n.name, c.name AS cluster, n.state, n.wanted_state, n.gpu_type, n.gpus, n.cpus, n.memory_bytes, n.address,
       n.labels, n.alive, n.stats, n.stats_at, n.runner_seen_at, n.clock_skew_s, n.version,
       coalesce(n.facts->>'own_users' = 'true', false) AS own_users,
       coalesce(u.gpus_used, 0) AS gpus_used, coalesce(u.jobs, '{{}}') AS jobs,
       h.attempts AS suspect_attempts, h.last_at AS suspect_at, h.message AS suspect_message
FROM nodes n
JOIN clusters c ON c.id = n.cluster_id
LEFT JOIN LATERAL (
    SELECT sum(cardinality(p.gpu_indices)) AS gpus_used,
           array_agg(DISTINCT a.job_id) FILTER (WHERE {visible}) AS jobs
    FROM placements p JOIN attempts a ON a.id = p.attempt_id JOIN jobs j ON j.id = a.job_id
    WHERE p.node_id = n.id AND p.released_at IS NULL
) u ON true
CROSS JOIN LATERAL (
    SELECT count(DISTINCT e.attempt_id) AS attempts, max(e.at) AS last_at,
           (array_agg(e.message ORDER BY e.id DESC))[1] AS message
    FROM (
        SELECT id, attempt_id, at, message FROM events
        WHERE node_id = n.id AND kind = 'health'
          AND id > coalesce((SELECT max(r.id) FROM events r WHERE r.node_id = n.id AND r.kind = 'node_ready'), 0)
        ORDER BY id DESC LIMIT {suspect_events}
    ) e
    WHERE e.at > CAST(:now AS timestamptz) - make_interval(hours => {suspect_hours})
) h
WHERE {conditions}
ORDER BY c.name, n.name, n.id LIMIT :limit
"""
_VISIBLE = f"j.tenant_id IN (SELECT id FROM tenants WHERE {SUBTREE})"


async def list_nodes(
    conn: AsyncConnection, *, tenant: str | None, after: tuple[str, str] | None, limit: int, now: datetime
) -> list[Row[Any]]:
    """Nodes by cluster and name, after the pair `after`; `jobs` are those of the subtree `tenant` (None = all)."""
    conditions = "(c.name, n.name) > (:cluster, :name)" if after else "true"
    values = {"cluster": after[0], "name": after[1]} if after else {}
    return await _select(conn, conditions, values | {"limit": limit, "now": now}, tenant)


async def load_node(conn: AsyncConnection, node_id: UUID, *, tenant: str | None, now: datetime) -> Row[Any] | None:
    rows = await _select(conn, "n.id = :id", {"id": node_id, "limit": 1, "now": now}, tenant)
    return rows[0] if rows else None


async def nodes_named(conn: AsyncConnection, name: str) -> list[Row[Any]]:
    """Id and cluster of every node with this name: names are unique within a cluster only."""
    query = "SELECT n.id, c.name AS cluster FROM nodes n JOIN clusters c ON c.id = n.cluster_id WHERE n.name = :name"
    return list(await conn.execute(text(query + " ORDER BY c.name"), {"name": name}))


async def _select(conn: AsyncConnection, conditions: str, values: dict[str, Any], tenant: str | None) -> list[Row[Any]]:
    visible = "true" if tenant is None else _VISIBLE
    query = _NODES.format(
        visible=visible, conditions=conditions, suspect_hours=SUSPECT_HOURS, suspect_events=SUSPECT_EVENTS
    )
    return list(await conn.execute(text(query), values if tenant is None else values | {"tenant": tenant}))


_OCCUPANTS = f"""
SELECT DISTINCT p.node_id, j.id AS job_id, a.state, a.created_at,
       CAST(j.spec->'preemption'->>'preemptible' AS boolean) AS preemptible,
       coalesce(a.started_at, a.created_at)
           + make_interval(secs => CAST(j.spec->'preemption'->>'min_runtime' AS double precision)) AS protected_until,
       make_interval(secs => a.grace_s) + CASE a.state WHEN 'stopping' THEN a.stop_requested_at WHEN 'lost' THEN NULL
           ELSE a.started_at + make_interval(secs => {LEFT_S}) END AS ends_by
FROM placements p JOIN attempts a ON a.id = p.attempt_id JOIN jobs j ON j.id = a.job_id
WHERE p.node_id = ANY(CAST(:ids AS uuid[])) AND p.released_at IS NULL AND {{visible}}
ORDER BY a.created_at, j.id
"""


async def load_occupants(
    conn: AsyncConnection, node_ids: Sequence[UUID], *, tenant: str | None, default_s: float | None
) -> dict[UUID, list[tuple[UUID, Occupant]]]:
    """By node the jobs of the subtree `tenant` (None = all) that hold something there, and what keeps each.
    `default_s`: the time limit of jobs that name none."""
    found: dict[UUID, list[tuple[UUID, Occupant]]] = {}
    query = text(_OCCUPANTS.format(visible="true" if tenant is None else _VISIBLE))
    values = {"ids": list(node_ids), "default_s": default_s} | ({} if tenant is None else {"tenant": tenant})
    for row in await conn.execute(query, values):
        occupant = Occupant(row.state, row.preemptible, row.protected_until, row.ends_by)
        found.setdefault(row.node_id, []).append((row.job_id, occupant))
    return found


async def names_of_nodes(conn: AsyncConnection, nodes: Sequence[str]) -> dict[str, str]:
    """Names by the uuid in hex, which is how snapshots name nodes."""
    query = text("SELECT id, name FROM nodes WHERE id = ANY(CAST(:ids AS uuid[]))")
    rows = await conn.execute(query, {"ids": [UUID(hex=node) for node in nodes]})
    return {row.id.hex: row.name for row in rows}


async def gpu_types_of_nodes(conn: AsyncConnection) -> list[str]:
    """Of live nodes with GPUs, each type once."""
    query = text("SELECT DISTINCT gpu_type FROM nodes WHERE alive AND gpus > 0 ORDER BY gpu_type")
    return list((await conn.execute(query)).scalars())


async def without_shared_checkpoints(conn: AsyncConnection) -> list[str]:
    """Names of live nodes whose checkpoint directory no other node sees."""
    query = text("SELECT name FROM nodes WHERE alive AND facts->>'shared_checkpoints' = 'false' ORDER BY name LIMIT 10")
    return list((await conn.execute(query)).scalars())


@dataclass(frozen=True, slots=True)
class NodeFullness:
    """What a node said last: `fullness` is the JSON of `messages.Fullness`, None from a runner that does not say it."""

    cluster: str
    name: str
    spool_bytes: int
    fullness: str | None


async def load_fullness(conn: AsyncConnection) -> list[NodeFullness]:
    """Of every node that has said anything yet."""
    query = text(
        "SELECT c.name AS cluster, n.name, CAST(n.stats->>'spool_bytes' AS bigint), n.stats->>'fullness'"
        " FROM nodes n JOIN clusters c ON c.id = n.cluster_id WHERE n.stats ? 'spool_bytes'"
    )
    return [NodeFullness(*row) for row in await conn.execute(query)]


async def load_backlogs(conn: AsyncConnection) -> dict[str, str | None]:
    """By cluster what its agent said last of what it keeps: the JSON of `messages.Backlog`."""
    rows = await conn.execute(text("SELECT name, agent_backlog::text FROM clusters"))
    return {row.name: row.agent_backlog for row in rows}
