"""Give up a node: its attempts are lost, their jobs wait until the old ranks are certainly gone, then start again.

Owns the consequences. Whether the node is really lost was judged by the caller (`watch_nodes`, or an operator).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.attempt_change import AttemptChange, write
from phalanx_server.actions.expect_lease import expect_lease
from phalanx_server.domain.attempt import StopCause, decide_end
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.node import NodeState
from phalanx_server.store.attempts import lock_attempts_on
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.leases import Lease
from phalanx_server.store.nodes import lock_node, mark_lost
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify


@dataclass(frozen=True, slots=True)
class Loss:
    """What was lost with a node. `jobs` had an attempt there."""

    node_id: UUID
    jobs: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a leader judged a node by, and under which lease."""

    lease: Lease
    alive: bool
    runner_seen_at: datetime | None


@rerun_on_deadlock
async def lose_node(
    engine: AsyncEngine,
    node_id: UUID,
    *,
    why: str,
    now: datetime,
    fence_s: float,
    grace_s: float,
    judged: Judged | None = None,
) -> Loss | None:
    """Mark the node lost; None if there is no such node, if it is lost already, or if it is no longer as it was
    `judged` (None = whatever it is like). Raises LeaseLost.

    Its attempts stay charged for what they hold until it is confirmed gone; against quotas only until cut-off ranks
    have ended themselves, after `fence_s` + `grace_s`. Then their jobs start again too, or at once where a job says
    `restart: eager`.
    """
    async with engine.begin() as conn:
        if judged is not None:
            await expect_lease(conn, judged.lease)
        node = await lock_node(conn, node_id)
        if node is None or node.state == NodeState.LOST or not _is_as(judged, node):
            return None
        await mark_lost(conn, node_id, now=now)
        changes = [AttemptChange(row, now) for row in await lock_attempts_on(conn, [node_id])]
        for change in changes:
            _lose(change, node.name, now + timedelta(seconds=fence_s + grace_s))
        message = f"Node {node.name} is lost: {why}."
        await record_events(conn, [Event(at=now, kind=EventKind.NODE_LOST.value, message=message, node_id=node_id)])
        await write(conn, changes, now=now)
        await notify(conn, "queue", "node")
    return Loss(node_id, tuple(change.row.job_id for change in changes))


def _is_as(judged: Judged | None, node: Row[Any]) -> bool:
    """Whether nothing was heard of the node since it was judged."""
    return judged is None or (judged.alive, judged.runner_seen_at) == (node.alive, node.runner_seen_at)


def _lose(change: AttemptChange, node: str, certain_at: datetime) -> None:
    """A stop that was asked for before still decides what becomes of the job."""
    end = decide_end(change.end_facts(at=change.now, default_cause=StopCause.NODE_LOST))
    eager = change.row.spec["restart"] == "eager"
    backoff_until = None if eager else certain_at
    change.lose(end, message=f"node {node} was lost", certain_at=certain_at, backoff_until=backoff_until)
