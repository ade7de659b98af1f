"""What nodes there are, as submits look at it: kinds of them, and how many of each."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import nodes


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Nodes of one cluster that have the same, whatever their state."""

    cluster_id: UUID
    gpu_type: str
    gpus: int
    cpus: int
    memory_bytes: int
    nodes: int


async def node_kinds(conn: AsyncConnection) -> list[NodeKind]:
    """Empty where no node has ever been seen."""
    kind = (nodes.c.cluster_id, nodes.c.gpu_type, nodes.c.gpus, nodes.c.cpus, nodes.c.memory_bytes)
    return [NodeKind(*row) for row in await conn.execute(select(*kind, func.count()).group_by(*kind))]
