"""Leadership: one scheduler acts, the others wait for its lease to run out.

Owns renewing. That a deposed leader does no harm does not rest on this loop but on the lease's epoch, which every
commit checks; here it only learns soon that it should stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.acquire_lease import acquire_lease, surrender_lease
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.store.leases import Lease

log = structlog.get_logger()

LEASE = "scheduler"


class Leader:
    """Holds the scheduler's lease for this process, or tries to. `lease` is None while another leads."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        holder: str,
        ttl_s: float,
        renew_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._holder = holder
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._monotonic = monotonic
        self.pulse = Pulse()
        self._lease: Lease | None = None
        self._valid_until = 0.0
        self.elected = asyncio.Event()

    @property
    def lease(self) -> Lease | None:
        """The lease, as long as it can still be in force."""
        return self._lease if self._monotonic() < self._valid_until else None

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    @property
    def lease_age_s(self) -> float:
        """Since the lease was asked for that is in force; 0 while another leads."""
        lease, asked_at = self._lease, self._valid_until - self._ttl_s
        return 0.0 if lease is None else self._monotonic() - asked_at

    async def tick(self, now: datetime) -> Lease | None:
        """Take or renew the lease. The time is the database's; `now` is for the log."""
        asked_at = self._monotonic()
        before = self._lease
        lease = await acquire_lease(self._engine, name=LEASE, holder=self._holder, ttl_s=self._ttl_s)
        self._lease, self._valid_until = lease, asked_at + self._ttl_s
        if lease != before:
            log.info("leadership changed", leads=lease is not None, epoch=lease and lease.epoch, at=now.isoformat())
        if lease is None:
            self.elected.clear()
        else:
            self.elected.set()
        return lease

    async def resign(self) -> None:
        """Let another lead at once."""
        lease, self._lease = self._lease, None
        self.elected.clear()
        if lease is not None:
            await surrender_lease(self._engine, lease)

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(self._pause_s), name="leader", pulse=self.pulse)

    @property
    def _pause_s(self) -> float:
        """Who waits for the lease asks more often than it is renewed: what has run out is taken soon."""
        return self._renew_s if self._lease is not None else self._renew_s / 4
