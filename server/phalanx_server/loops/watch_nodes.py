"""Watch nodes: who is silent for too long is given up, who is back is taken back.

Owns the judgement of silence. It counts only while somebody listened: the listener is the server that runners and
agents report to, and the only proof that it is there is that the cluster's agent is heard. So all silence is counted
from when the agent was heard without a break, plus a grace.

* The agent says that a node is not alive: lost after the grace.
* The agent is heard and says alive, but the runner is silent for `node_timeout_s`: lost. The agent, which still reaches
  the node if anything does, ends what runs there, because it is no longer desired.
* The agent is silent: nothing is known, nothing is lost. Only when agent and runner are silent for
  `outage_tolerance_s`, after which a cut-off cluster has ended its ranks by itself, are its nodes given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from phalanx.units import duration_text
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.expect_lease import LeaseLost, leading
from phalanx_server.actions.lose_node import Judged, lose_node
from phalanx_server.actions.recover_nodes import recover
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.store.leases import Lease
from phalanx_server.store.nodes import load_watched

log = structlog.get_logger()

INTERVAL_S = 1.0
OUTAGE_TOLERANCE_S = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long silence is borne, all in seconds."""

    node_timeout_s: float
    startup_grace_s: float
    fence_s: float
    loss_grace_s: float
    outage_tolerance_s: float = OUTAGE_TOLERANCE_S


@dataclass(frozen=True, slots=True)
class Listening:
    """Since when an agent instance has been heard without a break."""

    instance: str
    since: datetime


class WatchNodes:
    """`tick` looks at all nodes once; it does nothing while another process leads."""

    def __init__(self, engine: AsyncEngine, leader: Leader, patience: Patience) -> None:
        self._engine = engine
        self._leader = leader
        self._patience = patience
        self.pulse = Pulse()
        self._started_at: datetime | None = None
        self._looked_at: datetime | None = None
        self._heard: dict[UUID, Listening] = {}

    async def tick(self, now: datetime) -> list[UUID]:
        """Give up and take back nodes; those that were given up."""
        lease = self._leader.lease
        if lease is None:
            self._started_at = self._looked_at = None
            self._heard.clear()
            return []
        self._started_at = self._started_at or now
        async with self._engine.connect() as conn:
            rows = await load_watched(conn)
        self._listen(rows, now)
        lost = await self._give_up([(row, why) for row in rows if (why := self.verdict(row, now))], lease, now)
        await self._take_back(lease, now)
        return lost

    async def _give_up(self, silent: Sequence[tuple[Row[Any], str]], lease: Lease, now: datetime) -> list[UUID]:
        lost = []
        for row, why in silent:
            try:
                lost += [row.id] if await self._lose(row, why, lease, now) else []
            except LeaseLost as error:
                log.warning("node not given up", node=row.name, why=str(error))
                break
        return lost

    async def _take_back(self, lease: Lease, now: datetime) -> None:
        try:
            async with leading(self._engine, lease) as conn:
                await recover(conn, now=now)
        except LeaseLost as error:
            log.warning("no node taken back", why=str(error))

    def verdict(self, row: Row[Any], now: datetime) -> str | None:
        """Why a node (of `load_watched`) is given up; None if it is not."""
        patience = self._patience
        heard = self._heard.get(row.cluster_id)
        if heard is None:
            return self._outage(row, now)
        listening_since = heard.since + timedelta(seconds=patience.startup_grace_s)
        if now < listening_since:
            return None
        if not row.alive:
            return "its agent says that it is gone"
        if row.runner_seen_at is None:
            return None  # it never reported: nothing runs there that could be lost
        silence_s = (now - max(row.runner_seen_at, listening_since)).total_seconds()
        if silence_s > patience.node_timeout_s:
            return f"its runner was not heard for {duration_text(round(silence_s))}"
        return None

    def _outage(self, row: Row[Any], now: datetime) -> str | None:
        assert self._started_at is not None
        last = max(filter(None, (row.agent_seen_at, row.runner_seen_at, row.created_at, self._started_at)))
        silence_s = (now - last).total_seconds()
        if silence_s > self._patience.outage_tolerance_s:
            return f"its cluster was not heard for {duration_text(round(silence_s))}"
        return None

    def _listen(self, rows: Iterable[Row[Any]], now: datetime) -> None:
        """An agent that nobody looked at for a while may have been silent meanwhile, like the whole server."""
        longest_s = self._patience.node_timeout_s / 2
        if self._looked_at is None or (now - self._looked_at).total_seconds() > longest_s:
            self._heard.clear()
        self._looked_at = now
        for cluster_id, instance, seen_at in {(r.cluster_id, r.agent_instance, r.agent_seen_at) for r in rows}:
            silent = seen_at is None or (now - seen_at).total_seconds() > longest_s
            if silent:
                self._heard.pop(cluster_id, None)
            elif cluster_id not in self._heard or self._heard[cluster_id].instance != instance:
                self._heard[cluster_id] = Listening(instance, now)

    async def _lose(self, row: Row[Any], why: str, lease: Lease, now: datetime) -> bool:
        """Whether it is lost now; not if it was heard since it was looked at."""
        patience = self._patience
        loss = await lose_node(
            self._engine,
            row.id,
            why=why,
            now=now,
            fence_s=patience.fence_s,
            grace_s=patience.loss_grace_s,
            judged=Judged(lease, row.alive, row.runner_seen_at),
        )
        if loss is None:
            return False
        log.warning("node lost", node=row.name, why=why, jobs=[job.hex for job in loss.jobs])
        return True

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(INTERVAL_S), name="watch_nodes", pulse=self.pulse)
