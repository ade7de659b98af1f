"""Measure how fast elastic jobs are with each number of replicas, so that passes know what growing brings."""

from __future__ import annotations

import asyncio
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.measure_speeds import measure_speeds
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever

INTERVAL_S = 10.0


class MeasureSpeeds:
    """`tick` reads once what running elastic jobs have reported; it does nothing while another process leads."""

    def __init__(self, engine: AsyncEngine, leader: Leader) -> None:
        self._engine = engine
        self._leader = leader
        self.pulse = Pulse()

    async def tick(self, now: datetime) -> list[UUID]:
        """The jobs of which something new was read."""
        return await measure_speeds(self._engine) if self._leader.lease is not None else []

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(INTERVAL_S), name="speeds", pulse=self.pulse)
