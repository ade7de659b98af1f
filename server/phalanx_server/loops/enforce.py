"""Enforce time limits: ask the attempts to end that run for longer than their job allows."""

from __future__ import annotations

import asyncio
from datetime import datetime
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.enforce_limits import enforce_limits
from phalanx_server.actions.expect_lease import LeaseLost
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever

log = structlog.get_logger()

INTERVAL_S = 1.0


class Enforce:
    """`tick` looks at all running attempts once; it does nothing while another process leads."""

    def __init__(self, engine: AsyncEngine, leader: Leader) -> None:
        self._engine = engine
        self._leader = leader
        self.pulse = Pulse()

    async def tick(self, now: datetime) -> list[UUID]:
        """The jobs that were asked to end."""
        lease = self._leader.lease
        if lease is None:
            return []
        try:
            return await enforce_limits(self._engine, lease, now=now)
        except LeaseLost as lost:
            log.warning("limits not enforced", why=str(lost))
            return []

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(INTERVAL_S), name="enforce", pulse=self.pulse)
