"""Take the agent's list of nodes: what is there, what is new, what is gone.

Owns what follows from it: new rows, `alive`, node tokens, nodes that are taken back. Refuses to declare a node lost:
`watch_nodes` does, after a grace. Of two agents of a cluster the one that came last speaks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.agent_instance import expect_instance
from phalanx_server.actions.recover_nodes import recover
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.messages import Inventory, InventoryAnswer, NodeFacts
from phalanx_server.store import ids
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.leases import bury_agent
from phalanx_server.store.nodes import (
    expire_node_tokens,
    insert_nodes,
    load_cluster_nodes,
    merge_facts,
    update_nodes,
)
from phalanx_server.store.schema import clusters
from phalanx_server.store.tokens import TokenRow, insert_token, mint
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

# An old token still serves the runner until the agent has handed it the new one.
OLD_TOKEN_GRACE_S = 600.0

_COLUMNS = ("ray_node_id", "gpu_type", "gpus", "cpus", "memory_bytes", "address", "labels", "alive")


@rerun_on_deadlock
async def update_inventory(
    engine: AsyncEngine,
    inventory: Inventory,
    *,
    cluster_id: UUID,
    now: datetime,
    fence_s: float,
    heartbeat_s: float,
    outage_tolerance_s: float = 3_600.0,
) -> InventoryAnswer:
    """Raises Superseded for an agent that was replaced, Invalid if two nodes have one name."""
    facts = {node.name: node for node in inventory.nodes}
    if len(facts) < len(inventory.nodes):
        raise Invalid.field("nodes", "two nodes have the same name", "names are unique within a cluster")
    async with engine.begin() as conn:
        await _take_over(conn, cluster_id, inventory, now)
        known = await load_cluster_nodes(conn, cluster_id)
        changed = await _write(conn, cluster_id, facts, known, now)
        if changed:
            known = await load_cluster_nodes(conn, cluster_id)
        tokens = {
            name: await _token(conn, known[name], inventory.instance, now)
            for name, node in facts.items()
            if node.alive and (name in inventory.without_token or _is_new(known[name], inventory.instance))
        }
        await recover(conn, now=now)
        if changed:
            await notify(conn, "queue", "node")
    return InventoryAnswer(
        server_time=now.timestamp(),
        node_ids={name: ids.encode("node", known[name].id) for name in facts},
        node_tokens=tokens,
        fence_s=fence_s,
        heartbeat_s=heartbeat_s,
        outage_tolerance_s=outage_tolerance_s,
    )


async def _take_over(conn: AsyncConnection, cluster_id: UUID, inventory: Inventory, now: datetime) -> None:
    """Note that the agent was heard; if it is a new one, the one before it is replaced for good."""
    instance = inventory.instance
    query = select(clusters.c.agent_instance).where(clusters.c.id == cluster_id).with_for_update(key_share=True)
    before = (await conn.execute(query)).scalar_one()
    if before != instance:
        await expect_instance(conn, cluster_id=cluster_id, instance=instance)
        if before is not None:
            await bury_agent(conn, cluster=cluster_id.hex, instance=before, successor=instance)
    backlog = inventory.backlog.encode() if inventory.backlog is not None else null()
    values = {"agent_instance": instance, "agent_seen_at": now, "agent_backlog": backlog}
    await conn.execute(update(clusters).where(clusters.c.id == cluster_id).values(values))


async def _write(
    conn: AsyncConnection,
    cluster_id: UUID,
    facts: Mapping[str, NodeFacts],
    known: Mapping[str, Row[Any]],
    now: datetime,
) -> bool:
    """Insert and change rows where something is new; whether anything was. A node that is not listed is not alive."""
    new = [
        _values(node) | {"id": ids.new_id(), "cluster_id": cluster_id, "created_at": now}
        for name, node in facts.items()
        if name not in known
    ]
    changed = [
        {"id": known[name].id, "stats": _kept_stats(known[name], node)}
        | {column: values[column] for column in _COLUMNS}
        for name, node in facts.items()
        if name in known and (values := _values(node)) and _differs(known[name], values)
    ]
    missing = [{"id": row.id, "alive": False} for name, row in known.items() if name not in facts and row.alive]
    await insert_nodes(conn, new)
    await update_nodes(conn, changed)
    await update_nodes(conn, missing)
    for name, node in facts.items():
        if name in known and any(known[name].facts.get(key) != value for key, value in _values(node)["facts"].items()):
            await merge_facts(conn, known[name].id, _values(node)["facts"])
    joined = EventKind.NODE_JOINED.value
    await record_events(
        conn, [Event(at=now, kind=joined, message=f"Node {row['name']} joined.", node_id=row["id"]) for row in new]
    )
    return bool(new or changed or missing)


def _values(node: NodeFacts) -> dict[str, Any]:
    values = {column: getattr(node, column) for column in _COLUMNS}
    facts = {"shared_checkpoints": node.shared_checkpoints, "own_users": node.own_users}
    return values | {"name": node.name, "facts": facts}


def _kept_stats(row: Row[Any], node: NodeFacts) -> Any:
    """Statistics are of a runner: a node that came back as another Ray node has not said any yet."""
    return row.stats if row.ray_node_id == node.ray_node_id else None


def _differs(row: Row[Any], values: Mapping[str, Any]) -> bool:
    return any(getattr(row, column) != values[column] for column in _COLUMNS)


# ------------------------------------------------------------------ node tokens


def _is_new(row: Row[Any], instance: str) -> bool:
    """A node gets a token for each agent instance and each Ray node."""
    return row.facts.get("token_for") != _purpose(row, instance)


def _purpose(row: Row[Any], instance: str) -> str:
    return f"{instance} {row.ray_node_id}"


async def _token(conn: AsyncConnection, row: Row[Any], instance: str, now: datetime) -> str:
    minted = mint()
    token = TokenRow(kind="node", role="node", name=f"node {row.name}", cluster_id=row.cluster_id, node_id=row.id)
    await expire_node_tokens(conn, row.id, at=now + timedelta(seconds=OLD_TOKEN_GRACE_S))
    await insert_token(conn, minted, token)
    await merge_facts(conn, row.id, {"token_for": _purpose(row, instance)})
    return minted.text
