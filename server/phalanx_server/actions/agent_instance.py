"""Which agent process speaks for a cluster: the newest. One that was replaced is told so and stays out."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.errors import Superseded
from phalanx_server.store.leases import is_agent_buried
from phalanx_server.store.schema import clusters


async def expect_instance(conn: AsyncConnection, *, cluster_id: UUID, instance: str) -> None:
    """Raises Superseded if a newer agent has taken over from this instance."""
    query = select(clusters.c.agent_instance).where(clusters.c.id == cluster_id)
    current = (await conn.execute(query)).scalar_one()
    if current != instance and await is_agent_buried(conn, cluster=cluster_id.hex, instance=instance):
        raise Superseded(f"agent {instance} was replaced by {current}")
