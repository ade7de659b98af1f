"""Cordon, drain or return a node, as an operator wants it.

Owns the wish. What follows from it the next pass decides: a draining node's preemptible jobs move off where there is
room elsewhere, others run on to their end, and it takes nothing new. A lost node keeps the wish for when it is back.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import NotFound
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.node import WANTED_STATES, NodeState
from phalanx_server.store import ids
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.nodes import lock_node, set_wanted_state
from phalanx_server.store.wakeups import notify

_EVENTS = {
    NodeState.READY: (EventKind.NODE_READY, "takes work again"),
    NodeState.CORDONED: (EventKind.NODE_CORDONED, "takes nothing new"),
    NodeState.DRAINING: (
        EventKind.NODE_DRAINING,
        "takes nothing new, and its preemptible jobs move where there is room",
    ),
}


async def set_node_state(engine: AsyncEngine, node_id: UUID, *, wanted: NodeState, actor: Actor, now: datetime) -> None:
    """Raises NotFound, and ValueError if `wanted` is not for operators to want. Wanting it again changes nothing."""
    if wanted not in WANTED_STATES:
        raise ValueError(f"nobody wants a node {wanted}")
    async with engine.begin() as conn:
        node = await lock_node(conn, node_id)
        if node is None:
            raise NotFound(f"There is no node {ids.encode('node', node_id)}.")
        if node.wanted_state == wanted:
            return
        await set_wanted_state(conn, node_id, wanted=wanted)
        kind, what = _EVENTS[wanted]
        event = Event(at=now, kind=kind.value, message=f"Node {node.name} {what}.", node_id=node_id)
        await record_events(conn, [event])
        await record_audit(conn, actor, f"node.{wanted.value}", ids.encode("node", node_id), {"name": node.name})
        await notify(conn, "queue", "node")
