"""Take back lost nodes that are alive, heard and empty."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.domain.event import EventKind
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.nodes import restore_nodes
from phalanx_server.store.wakeups import notify


async def recover_nodes(engine: AsyncEngine, *, now: datetime) -> list[UUID]:
    """Those that are taken back, into the state that an operator wants them in."""
    async with engine.begin() as conn:
        return await recover(conn, now=now)


async def recover(conn: AsyncConnection, *, now: datetime) -> list[UUID]:
    """The same within a transaction."""
    rows = await restore_nodes(conn)
    await record_events(
        conn,
        [
            Event(at=now, kind=EventKind.NODE_BACK.value, message=f"Node {row.name} is back.", node_id=row.id)
            for row in rows
        ],
    )
    if rows:
        await notify(conn, "queue", "node")
    return [row.id for row in rows]
