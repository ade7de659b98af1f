"""Enforce time limits: ask the attempts to end that run for longer than their job may, and fail waiting jobs that have
run for so long already. Now and then, settle what the end of a job should have settled."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.enforce_limits import enforce_limits
from phalanx_server.actions.expect_lease import LeaseLost
from phalanx_server.actions.settle_dependents import settle_overlooked
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.leases import Lease

log = structlog.get_logger()

INTERVAL_S = 1.0
SWEEP = timedelta(seconds=30)


class Enforce:
    """`tick` looks at all running attempts once, and every SWEEP at what jobs wait for; it does nothing while another
    process leads. `policy` is that of the settings file: what is set through the API goes over it."""

    def __init__(self, engine: AsyncEngine, leader: Leader, *, policy: Policy) -> None:
        self._engine = engine
        self._leader = leader
        self._policy = policy
        self._swept_at: datetime | None = None
        self.pulse = Pulse()

    async def tick(self, now: datetime) -> list[UUID]:
        """The jobs that were asked to end, and those that failed."""
        lease = self._leader.lease
        if lease is None:
            return []
        try:
            ended = await enforce_limits(self._engine, lease, base=self._policy, now=now)
            await self._sweep(lease, now)
            return ended
        except LeaseLost as lost:
            log.warning("limits not enforced", why=str(lost))
            return []

    async def _sweep(self, lease: Lease, now: datetime) -> None:
        if self._swept_at is not None and now - self._swept_at < SWEEP:
            return
        self._swept_at = now
        settled = await settle_overlooked(self._engine, lease, now=now)
        if settled:
            log.warning("ends settled that had been overlooked", jobs=[job.hex for job in settled])

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(INTERVAL_S), name="enforce", pulse=self.pulse)
