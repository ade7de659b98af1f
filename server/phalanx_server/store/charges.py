"""What is charged on nodes: what attempts hold, and what those that are stopping go on in.

Owns the SQL. A stopping attempt with a `next` is charged the larger of what it holds and its `next`, on each node and
by resource: `charges` says the one, `next_charges` what comes on top. Refuses to know what is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Amounts:
    """Of one node."""

    gpus: int
    cpus: float
    memory_bytes: int

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(self.gpus + other.gpus, self.cpus + other.cpus, self.memory_bytes + other.memory_bytes)

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(self.gpus - other.gpus, self.cpus - other.cpus, self.memory_bytes - other.memory_bytes)

    @property
    def overdrawn(self) -> bool:
        return self.gpus < 0 or self.cpus < 0 or self.memory_bytes < 0


NOTHING = Amounts(0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Charge:
    """What is held of a node."""

    gpu_indices: frozenset[int] = frozenset()
    cpus: float = 0.0
    memory_bytes: int = 0


_CHARGES = text(
    """
    SELECT node_id, array_agg(index) FILTER (WHERE index IS NOT NULL) AS gpu_indices,
           sum(cpus) FILTER (WHERE first) AS cpus, sum(memory_bytes) FILTER (WHERE first)::bigint AS memory_bytes
    FROM (
        SELECT p.node_id, p.cpus, p.memory_bytes, gpu.index, coalesce(gpu.place, 1) = 1 AS first
        FROM placements p LEFT JOIN LATERAL unnest(p.gpu_indices) WITH ORDINALITY AS gpu (index, place) ON true
        WHERE p.node_id = ANY(CAST(:ids AS uuid[])) AND p.released_at IS NULL
    ) charged GROUP BY node_id
    """
)


async def charges(conn: AsyncConnection, node_ids: Iterable[UUID]) -> dict[UUID, Charge]:
    """What is held on these nodes; a node on which nothing is held is missing."""
    rows = await conn.execute(_CHARGES, {"ids": list(node_ids)})
    return {row.node_id: Charge(frozenset(row.gpu_indices or ()), row.cpus, int(row.memory_bytes)) for row in rows}


_STAYS = text(
    """
    SELECT p.node_id, sum(cardinality(p.gpu_indices)) AS gpus, sum(p.cpus) AS cpus, sum(p.memory_bytes) AS memory_bytes
    FROM placements p JOIN attempts a ON a.id = p.attempt_id
    WHERE p.node_id = ANY(CAST(:ids AS uuid[])) AND p.released_at IS NULL AND a.state IN ('starting', 'running')
    GROUP BY p.node_id
    """
)


async def charges_that_stay(conn: AsyncConnection, node_ids: Iterable[UUID]) -> dict[UUID, Amounts]:
    """What attempts hold on these nodes that nobody has asked to stop; a node without any is missing."""
    return {row.node_id: _amounts(row) for row in await conn.execute(_STAYS, {"ids": list(node_ids)})}


@dataclass(frozen=True, slots=True)
class NextCharge:
    """What stopping attempts go on in on a node, and how much of it is `beyond` what each holds there itself."""

    whole: Amounts
    beyond: Amounts


NO_NEXT = NextCharge(NOTHING, NOTHING)

_NEXT = text(
    """
    SELECT next.node_id, sum(next.gpus) AS gpus, sum(next.cpus) AS cpus, sum(next.memory_bytes) AS memory_bytes,
           sum(greatest(next.gpus - coalesce(cardinality(p.gpu_indices), 0), 0)) AS beyond_gpus,
           sum(greatest(next.cpus - coalesce(p.cpus, 0), 0)) AS beyond_cpus,
           sum(greatest(next.memory_bytes - coalesce(p.memory_bytes, 0), 0)) AS beyond_memory_bytes
    FROM (
        SELECT a.id, CAST(item->>'node' AS uuid) AS node_id,
               CAST(item->>'replicas' AS bigint) * CAST(j.spec->'resources'->>'gpus_per_replica' AS bigint) AS gpus,
               CAST(item->>'replicas' AS bigint) * CAST(j.spec->'resources'->>'cpus_per_replica' AS bigint) AS cpus,
               CAST(item->>'replicas' AS bigint) * CAST(j.spec->'resources'->>'memory_per_replica' AS bigint)
                   AS memory_bytes
        FROM attempts a JOIN jobs j ON j.id = a.job_id
        CROSS JOIN LATERAL jsonb_array_elements(a.next->'placement') AS item
        WHERE a.state = 'stopping' AND a.next IS NOT NULL
    ) next
    LEFT JOIN placements p ON p.attempt_id = next.id AND p.node_id = next.node_id AND p.released_at IS NULL
    WHERE next.node_id = ANY(CAST(:ids AS uuid[])) GROUP BY next.node_id
    """
)


async def next_charges(conn: AsyncConnection, node_ids: Iterable[UUID]) -> dict[UUID, NextCharge]:
    """What stopping attempts go on in on these nodes; a node to which none goes is missing."""
    rows = await conn.execute(_NEXT, {"ids": list(node_ids)})
    return {
        row.node_id: NextCharge(
            _amounts(row), Amounts(int(row.beyond_gpus), float(row.beyond_cpus), int(row.beyond_memory_bytes))
        )
        for row in rows
    }


_HELD = text(
    """
    SELECT attempt_id, node_id, cardinality(gpu_indices) AS gpus, cpus, memory_bytes FROM placements
    WHERE attempt_id = ANY(CAST(:ids AS uuid[])) AND released_at IS NULL
    """
)


async def held_by(conn: AsyncConnection, attempt_ids: Iterable[UUID]) -> dict[UUID, dict[UUID, Amounts]]:
    """What each of these attempts holds, by node."""
    held: dict[UUID, dict[UUID, Amounts]] = {}
    for row in await conn.execute(_HELD, {"ids": list(attempt_ids)}):
        held.setdefault(row.attempt_id, {})[row.node_id] = _amounts(row)
    return held


def _amounts(row: Row[Any]) -> Amounts:
    return Amounts(int(row.gpus), float(row.cpus), int(row.memory_bytes))
