"""Deliver the outbox to the webhook, if there is one.

Owns order and patience: notices are posted oldest first, one that fails is tried again later with growing pauses, and
given up after MAX_TRIES. The network is never touched inside a transaction, so a notice may be posted twice, again by
the next leader where this one was deposed; its id tells the receiver. While the receiver is down only the first notice
of a tick is tried.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import httpx
import structlog
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.expect_lease import LeaseLost, leading
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.store.leases import Lease
from phalanx_server.store.outbox import due_notices, mark_delivered, mark_failed, skip_due_notices

log = structlog.get_logger()

INTERVAL_S = 2.0
BATCH = 100
TIMEOUT_S = 10.0
BACKOFF_S = 2.0
BACKOFF_MAX_S = 3_600.0
MAX_TRIES = 20
ERROR_CHARS = 500


class DeliverOutbox:
    """`tick` delivers what is due; it does nothing while another process leads."""

    def __init__(
        self, engine: AsyncEngine, leader: Leader, *, webhook_url: str | None, client: httpx.AsyncClient
    ) -> None:
        self._engine = engine
        self._leader = leader
        self._webhook_url = webhook_url
        self._client = client
        self.pulse = Pulse()
        self.due = 0
        """How many notices were due at the last look, which sees a batch at most."""
        self.lag_s = 0.0
        """For how long the oldest of them waits."""
        self.failures = 0
        """Deliveries that failed; each is tried again."""
        self.pause_s = INTERVAL_S
        """How long until the next tick: not at all while there is more than a batch, and it is taken."""

    async def tick(self, now: datetime) -> int:
        """The number of notices that are done with."""
        self.pause_s = INTERVAL_S
        lease = self._leader.lease
        if lease is None:
            self.due, self.lag_s = 0, 0.0
            return 0
        try:
            return await self._deliver(lease, now)
        except LeaseLost as lost:
            log.warning("notices not delivered", why=str(lost))
            self.pause_s = INTERVAL_S
            return 0

    async def _deliver(self, lease: Lease, now: datetime) -> int:
        if self._webhook_url is None:
            async with leading(self._engine, lease) as conn:
                return await skip_due_notices(conn, now=now)
        async with self._engine.connect() as conn:
            notices = await due_notices(conn, now=now, limit=BATCH)
        self.due = len(notices)
        self.lag_s = max((now - notice.created_at).total_seconds() for notice in notices) if notices else 0.0
        delivered: list[int] = []
        self.pause_s = 0.0 if len(notices) == BATCH else INTERVAL_S
        for notice in notices:
            if self._leader.lease != lease:
                break
            error = await self._post(self._webhook_url, notice)
            if error is not None:
                await self._failed(notice, error, lease, now)
                self.pause_s = INTERVAL_S
                break
            delivered.append(notice.id)
        if delivered:
            async with leading(self._engine, lease) as conn:
                await mark_delivered(conn, delivered, now=now)
        return len(delivered)

    async def _post(self, url: str, notice: Row[Any]) -> str | None:
        """Why it failed; None if the receiver took it."""
        body = {"id": notice.id, "topic": notice.topic, "created_at": notice.created_at.isoformat(), **notice.payload}
        try:
            answer = await self._client.post(url, json=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"[:ERROR_CHARS]
        return None if answer.is_success else f"answered {answer.status_code}"

    async def _failed(self, notice: Row[Any], error: str, lease: Lease, now: datetime) -> None:
        pause_s = min(BACKOFF_S * 2**notice.tries, BACKOFF_MAX_S)
        give_up = notice.tries + 1 >= MAX_TRIES
        self.failures += 1
        log.warning("notice not delivered", notice=notice.id, error=error, tries=notice.tries + 1, given_up=give_up)
        async with leading(self._engine, lease) as conn:
            due_at = now + timedelta(seconds=pause_s)
            await mark_failed(conn, notice.id, error=error, due_at=due_at, now=now, give_up=give_up)

    async def run_forever(self) -> None:
        await tick_forever(self.tick, lambda: asyncio.sleep(self.pause_s), name="deliver_outbox", pulse=self.pulse)
