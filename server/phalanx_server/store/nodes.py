"""Nodes: rows as the agent and the runner of each node describe them.

Owns the SQL. A `lost` node is ready again only when its runner was heard after the loss and nothing that was charged on
it is left (`restore_nodes`). Refuses to judge silence: `watch_nodes` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, bindparam, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import nodes, tokens

# ------------------------------------------------------------------ as the agent sees them


async def load_cluster_nodes(conn: AsyncConnection, cluster_id: UUID) -> dict[str, Row[Any]]:
    """All nodes of a cluster by name. The caller has locked the cluster."""
    rows = await conn.execute(select(nodes).where(nodes.c.cluster_id == cluster_id))
    return {row.name: row for row in rows}


async def insert_nodes(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        await conn.execute(insert(nodes), [dict(row) for row in rows])


async def update_nodes(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Change nodes: each row has `id` and the same other columns. Their version grows by one."""
    if not rows:
        return
    columns = [name for name in rows[0] if name != "id"]
    statement = update(nodes).where(nodes.c.id == bindparam("row_id"))
    statement = statement.values(
        {name: bindparam(f"new_{name}") for name in columns} | {"version": nodes.c.version + 1}
    )
    await conn.execute(
        statement, [{"row_id": row["id"]} | {f"new_{name}": row[name] for name in columns} for row in rows]
    )


_MERGE_FACTS = text("UPDATE nodes SET facts = facts || CAST(:facts AS jsonb) WHERE id = :id")


async def merge_facts(conn: AsyncConnection, node_id: UUID, facts: Mapping[str, Any]) -> None:
    await conn.execute(_MERGE_FACTS, {"id": node_id, "facts": dump_json(dict(facts))})


async def expire_node_tokens(conn: AsyncConnection, node_id: UUID, *, at: datetime) -> None:
    """Let the tokens that a node has run out at `at`, if not earlier."""
    ours = (tokens.c.node_id == node_id) & (tokens.c.expires_at.is_(None) | (tokens.c.expires_at > at))
    await conn.execute(update(tokens).where(ours).values(expires_at=at))


# ------------------------------------------------------------------ lost and found

_LOCK = text("SELECT id, name, state, wanted_state, alive, runner_seen_at FROM nodes WHERE id = :id FOR UPDATE")
_LOSE = text("UPDATE nodes SET state = 'lost', lost_at = :now, version = version + 1 WHERE id = :id")
_RESTORE = text(
    """
    UPDATE nodes n SET state = n.wanted_state, lost_at = NULL, version = n.version + 1
    WHERE n.id = ANY(ARRAY(
        SELECT f.id FROM nodes f WHERE f.state = 'lost' AND f.alive AND f.runner_seen_at > f.lost_at
          AND NOT EXISTS (SELECT FROM placements p WHERE p.node_id = f.id AND p.released_at IS NULL)
        FOR NO KEY UPDATE SKIP LOCKED))
    RETURNING n.id, n.name, n.state
    """
)


async def lock_node(conn: AsyncConnection, node_id: UUID) -> Row[Any] | None:
    """The node, locked so that nothing is placed on it meanwhile (`lock_nodes_for_placing` waits)."""
    return (await conn.execute(_LOCK, {"id": node_id})).one_or_none()


async def mark_lost(conn: AsyncConnection, node_id: UUID, *, now: datetime) -> None:
    await conn.execute(_LOSE, {"id": node_id, "now": now})


async def restore_nodes(conn: AsyncConnection) -> list[Row[Any]]:
    """Take back lost nodes that are alive, heard and empty, into the state that an operator wants them in.

    A node that somebody has locked is left for the next time: the caller may hold nodes that those wait for.
    """
    return list(await conn.execute(_RESTORE))


async def set_wanted_state(conn: AsyncConnection, node_id: UUID, *, wanted: str) -> None:
    """`wanted` is what an operator wants; a lost node stays lost until it is back."""
    statement = text(
        "UPDATE nodes SET wanted_state = :wanted, version = version + 1,"
        " state = CASE WHEN state = 'lost' THEN state ELSE :wanted END WHERE id = :id"
    )
    await conn.execute(statement, {"id": node_id, "wanted": wanted})


# Weaker than the lock of lock_node, which it waits for, and compatible with the runner's own reports.
_PLACING = text(
    """
    SELECT id, cluster_id, name, state, alive, gpu_type, gpus, cpus, memory_bytes
    FROM nodes WHERE id = ANY(CAST(:ids AS uuid[])) ORDER BY id FOR KEY SHARE
    """
)


async def lock_nodes_for_placing(conn: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, Row[Any]]:
    """These nodes; none is lost, cordoned or drained until the transaction ends."""
    return {row.id: row for row in await conn.execute(_PLACING, {"ids": list(ids)})}


# ------------------------------------------------------------------ as the runner reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What a runner's report says about its node."""

    node_id: UUID
    boot: str
    seq: int
    skew_s: float
    at: datetime
    stats: Mapping[str, Any] | None


_TAKE_SEQ = text(
    """
    UPDATE nodes SET runner_boot = :boot, runner_seq = :seq, runner_seen_at = :at, clock_skew_s = :skew_s,
        stats = coalesce(CAST(:stats AS jsonb), stats),
        stats_at = CASE WHEN CAST(:stats AS text) IS NULL THEN stats_at ELSE :at END
    WHERE id = :node_id AND (runner_boot IS DISTINCT FROM :boot OR runner_seq < :seq)
    """
)
_LAST_SEQ = text("SELECT runner_boot, runner_seq, state, clock_skew_s FROM nodes WHERE id = :id")


async def take_report(conn: AsyncConnection, heard: Heard) -> bool:
    """Note that the runner was heard; False if this report of this boot was taken before."""
    values = {
        "node_id": heard.node_id,
        "boot": heard.boot,
        "seq": heard.seq,
        "skew_s": heard.skew_s,
        "at": heard.at,
        "stats": None if heard.stats is None else dump_json(dict(heard.stats)),
    }
    return (await conn.execute(_TAKE_SEQ, values)).rowcount == 1


_NOTE_HEARD = text(
    """
    UPDATE nodes SET runner_seen_at = greatest(runner_seen_at, :at), clock_skew_s = :skew_s,
        stats = coalesce(CAST(:stats AS jsonb), stats),
        stats_at = CASE WHEN CAST(:stats AS text) IS NULL THEN stats_at ELSE :at END
    WHERE id = :node_id
    """
)


async def note_heard(conn: AsyncConnection, heard: Heard) -> None:
    """Note that the runner was heard, whose report cannot be taken now: its number stays free."""
    stats = None if heard.stats is None else dump_json(dict(heard.stats))
    values = {"node_id": heard.node_id, "skew_s": heard.skew_s, "at": heard.at, "stats": stats}
    await conn.execute(_NOTE_HEARD, values)


async def last_report(conn: AsyncConnection, node_id: UUID) -> Row[Any]:
    """`runner_boot`, `runner_seq`, `state` and `clock_skew_s` of a node."""
    return (await conn.execute(_LAST_SEQ, {"id": node_id})).one()


_LEFT_BEHIND = text(
    """
    SELECT p.attempt_id FROM placements p JOIN attempts a ON a.id = p.attempt_id AND a.state = 'lost'
    WHERE p.node_id = :node_id AND p.released_at IS NULL AND NOT p.attempt_id = ANY(CAST(:present AS uuid[]))
      AND a.ended_at < :before
    """
)


async def lost_attempts_without_ranks(
    conn: AsyncConnection, *, node_id: UUID, present: Sequence[UUID], before: datetime
) -> list[UUID]:
    """Attempts lost before a time and still charged on a node whose runner lists others (`present`) as having ranks."""
    rows = await conn.execute(_LEFT_BEHIND, {"node_id": node_id, "present": list(present), "before": before})
    return list(rows.scalars())


# ------------------------------------------------------------------ as watch_nodes looks at them

_WATCHED = text(
    """
    SELECT n.id, n.name, n.cluster_id, n.alive, n.runner_seen_at, n.created_at, c.agent_instance, c.agent_seen_at
    FROM nodes n JOIN clusters c ON c.id = n.cluster_id WHERE n.state <> 'lost'
    """
)


async def load_watched(conn: AsyncConnection) -> list[Row[Any]]:
    """Every node that is not lost, with when its runner and its agent were last heard."""
    return list(await conn.execute(_WATCHED))
