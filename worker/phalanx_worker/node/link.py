"""The runner's line to the server: reports go up in order, heartbeats with them.

Owns delivery: one report in flight, again until it is answered, from disk first and then from memory; backoff while the
server is away; whatever the server refuses is dropped for that attempt. Logs that find no storage are put aside, and
keep nothing else waiting. A report that the server rejects is taken apart until the item is found that it does not
take; one over which it fails again and again lets the others pass, so that no rank's text costs the node its heartbeat
or another attempt its logs. Knows neither ranks nor logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
from phalanx import config
from phalanx.retry import retry_after_s

from phalanx_worker import protocol
from phalanx_worker.node.answers import Delivery, refusal
from phalanx_worker.node.aside import Aside, without_logs
from phalanx_worker.node.fence import OutageFence
from phalanx_worker.node.halves import Halves
from phalanx_worker.node.outbox import AttemptKey, Batch, Item, Outbox, count_by_kind, dropped_marks
from phalanx_worker.node.spool import Spool
from phalanx_worker.protocol import Heartbeat, NodeAnswer

log = logging.getLogger("phalanx.node.link")

_GATHER_S = 0.02  # what comes within this time travels together
_EVERY_S = 0.25  # and after one report the next waits this long, unless somebody waits for it
_BACKOFF_S = (0.25, 5.0)
_MOST_DOUBLINGS = 8
_SPILL_BYTES = 4 << 20
_REQUEST_TIMEOUT_S = 10.0
_RETRY_AFTER_MAX_S = 10.0  # whatever a proxy asks for: a runner that is silent for 20 s is taken for lost
_FAULTS_BORNE = 3  # in a row, before the heartbeat is tried alone
_POSTPONED_AT_MOST = 2  # after that a report over which the server fails is taken apart like a rejected one


class Link:
    """`heartbeat` is asked for each time one is due, `taken` told of each report that is done with.

    `run` delivers until cancelled.
    """

    def __init__(
        self,
        outbox: Outbox,
        spool: Spool,
        heartbeat: Callable[[], Heartbeat],
        taken: Callable[[], object] = lambda: None,
    ):
        self._outbox = outbox
        self._spool = spool
        self._aside = Aside(spool.within("logs"), outbox.number, outbox.put_item)
        self._heartbeat = heartbeat
        self._taken = taken
        self._under_way: set[AttemptKey] = set()  # who is in the report that is neither in memory nor on disk
        self._client: httpx.AsyncClient | None = None
        self._server_url = ""
        self._heartbeat_s = 2.0
        self._heartbeat_due = 0.0  # monotonic, as the next
        self._sent_at = 0.0
        self._failures = 0
        self._retry_after_s: float | None = None  # of the last answer
        self.outage = OutageFence(tolerance_s=3_600.0)
        self._faults = 0  # reports in a row over which the server failed
        self._kinds_taken: set[str] = set()  # since a report was last postponed
        # `dropped` marks for reports that are lost, kept until the server takes something again
        self._owed: list[Item] = []
        self._lost: Counter[str] = Counter()
        self._flushes: list[asyncio.Event] = []
        self._urgent = asyncio.Event()

    async def configure(
        self, *, server_url: str, token: str, heartbeat_s: float, outage_tolerance_s: float = 3_600.0
    ) -> None:
        """Use this server and token from now on. A new token alone disturbs no request that is under way."""
        old = self._client
        if old is None or self._server_url != server_url:
            self._server_url = server_url
            self._client = httpx.AsyncClient(
                base_url=server_url,
                headers={"Content-Type": "application/json"},
                timeout=_REQUEST_TIMEOUT_S,
                trust_env=not config.is_local(server_url),  # a proxy is not meant for a server on this machine
            )
            if old is not None:
                await old.aclose()
        assert self._client is not None
        self._client.headers["Authorization"] = f"Bearer {token}"
        self._heartbeat_s = heartbeat_s
        self.outage.tolerance_s = outage_tolerance_s
        self._failures = 0
        self._urgent.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._heartbeat_due - time.monotonic())):
                    await self._something_to_send()
            began_at = time.monotonic()
            try:
                await self.deliver()
            except Exception:  # a disk that fails, say: a link that ended would make the node look lost
                log.exception("delivering reports failed")
                self.outage.in_vain(began_at)
                self._failures += 1
            if self._failures:
                await self._pause()

    async def deliver(self) -> None:
        """Send what waits, oldest first, until nothing does or the server is away; or a heartbeat that is due."""
        self._urgent.clear()
        flushes, self._flushes = self._flushes, []
        while self._client and (self._is_report_due() or self._aside.is_due):
            send = self._deliver_one if self._is_report_due() else self._deliver_aside
            if not await send(self._client):
                break
        for flush in flushes:
            flush.set()

    async def flush(self, timeout_s: float) -> None:
        """Wait until what waits now is delivered; not at all while the server is away."""
        if self._failures or self._client is None:
            return
        done = asyncio.Event()
        self._flushes.append(done)
        self._urgent.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await done.wait()

    def holds(self, attempt: AttemptKey) -> bool:
        """Whether anything of an attempt of this runner has not reached the server yet, but for logs that find no
        storage: the end of a job does not wait for those."""
        return attempt in self._under_way or self._outbox.holds(attempt) or self._spool.holds(attempt)

    async def close(self) -> None:
        """One last try, then to disk."""
        await self.deliver()
        self._save_waiting()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    @property
    def client(self) -> httpx.AsyncClient | None:
        """For what goes beside the reports (`transfers`); None while there is no server to speak to."""
        return self._client

    @property
    def is_away(self) -> bool:
        """Whether the last report did not get through."""
        return self._client is None or self._failures > 0

    @property
    def spools(self) -> tuple[Spool, Spool]:
        """Of reports, and of logs that find no storage."""
        return self._spool, self._aside.spool

    @property
    def dropped(self) -> Counter[str]:
        """How many items were given up since the start, by kind."""
        parts = (self._outbox, self._spool, self._aside, self._aside.spool)
        return sum((part.dropped for part in parts), self._lost)

    # -------------------------------------------------------------- one report

    async def _deliver_one(self, client: httpx.AsyncClient) -> bool:
        """Send the oldest report, in parts if need be; True if the next may follow at once.

        What comes faster than it can be sent waits on disk, where there is more room than in memory. Only here: while
        no report is under way, what is saved is in order.
        """
        if self._outbox.size_bytes > _SPILL_BYTES:
            self._save_waiting()
        stored = self._spool.oldest()
        path, batch = stored if stored else (None, self._outbox.next_batch())
        batch = self._without_refused(batch)
        if len(self._aside.spool):
            batch = self._put_aside(path, batch)
        self._under_way = batch.attempts
        try:
            outcome = await self._send(client, batch)
            if outcome is Delivery.UNSTORED:
                self._aside.wait(self._retry_after_s)
                batch = self._put_aside(path, batch)
                outcome = await self._send(client, batch)
        except asyncio.CancelledError:
            if path is None:
                self._save(batch)  # perhaps taken, perhaps not: its number lets it be sent again
            raise
        finally:
            self._under_way = set()
        if outcome is not Delivery.TAKEN:
            path = path or self._save(batch)
        return await self._conclude(client, self._spool, path, batch, outcome)

    async def _deliver_aside(self, client: httpx.AsyncClient) -> bool:
        """Try the oldest logs that were put aside."""
        stored = self._aside.oldest()
        if stored is None:
            return True
        path, batch = stored[0], self._without_refused(stored[1])
        outcome = await self._send(client, batch)
        if outcome is not Delivery.TAKEN:
            self._aside.wait(self._retry_after_s)
        if outcome is Delivery.UNSTORED:
            return True  # the heartbeat was taken, and these are not due any more
        return await self._conclude(client, self._aside.spool, path, batch, outcome)

    def _put_aside(self, path: Path | None, batch: Batch) -> Batch:
        """What is left of a batch without its logs, which wait for the storage; `path` is where it is stored."""
        rest, logs = without_logs(batch)
        if logs is None:
            return batch
        self._owed += self._aside.add(logs)
        if path is not None:
            with contextlib.suppress(OSError):  # then it still has them: the server knows a piece that comes twice
                self._spool.replace(path, rest)
        return rest

    async def _conclude(
        self, client: httpx.AsyncClient, spool: Spool, path: Path | None, batch: Batch, outcome: Delivery
    ) -> bool:
        """Draw the conclusions from an outcome; True if the next may follow at once."""
        if outcome is Delivery.TAKEN:
            self._take(spool, path, batch)
            self._taken()
            return True
        may_pass = outcome is not Delivery.AWAY
        if path is not None and may_pass and await self._get_past(client, spool, path, batch, outcome):
            self._pay()
            self._taken()
            return True
        self._failures += 1
        if self._outbox.size_bytes:
            self._save_waiting()
        return False

    def _take(self, spool: Spool, path: Path | None, batch: Batch) -> None:
        """The server has it."""
        self._failures = 0
        if path is not None:
            spool.remove(path)
        if batch.items:
            self._faults = 0
            self._kinds_taken |= batch.kinds
        self._pay()

    def _pay(self) -> None:
        owed, self._owed = self._owed, []
        for mark in owed:
            self._outbox.put_item(mark)

    async def _get_past(
        self, client: httpx.AsyncClient, spool: Spool, path: Path, batch: Batch, outcome: Delivery
    ) -> bool:
        """The server rejected a stored report or failed over it. Only where it takes a heartbeat alone is the report to
        blame. True when the report is dealt with and the next may follow."""
        self._faults += outcome is Delivery.FAULT
        if outcome is Delivery.FAULT and self._faults < _FAULTS_BORNE:
            return False
        halves = Halves(batch)
        alone = halves.nothing()
        spool.replace(path, halves.rest())
        if await self._send(client, alone) is not Delivery.TAKEN:
            return False
        if outcome is Delivery.REJECTED:
            return await self._send_apart(client, spool, path, halves, {Delivery.REJECTED})
        if batch.postponed >= _POSTPONED_AT_MOST:
            return await self._send_apart(client, spool, path, halves, {Delivery.REJECTED, Delivery.FAULT})
        self._postpone(spool, path, batch)
        return False

    def _postpone(self, spool: Spool, path: Path, batch: Batch) -> None:
        """Let all others pass. It counts only if the like of it was taken meanwhile: perhaps no logs can be stored."""
        others_pass = batch.kinds <= self._kinds_taken
        self._kinds_taken = set()
        spool.remove(path)
        self._save(self._outbox.number(batch.items, postponed=batch.postponed + others_pass))

    async def _send_apart(
        self, client: httpx.AsyncClient, spool: Spool, path: Path, halves: Halves, refusals: set[Delivery]
    ) -> bool:
        """Send a report once more, then in ever smaller parts if the server does not take it; False if it went away."""
        try:
            while (part := halves.next()) is not None:
                outcome = await self._send(client, part)
                if outcome is Delivery.FAULT and await self._send(client, halves.nothing()) is not Delivery.TAKEN:
                    return False
                if outcome is Delivery.TAKEN:
                    halves.taken()
                elif outcome in refusals:
                    halves.rejected()
                else:
                    return False
            return True
        finally:
            self._lose(halves.lost)
            self._keep_rest(spool, path, halves.rest())

    def _keep_rest(self, spool: Spool, path: Path, rest: Batch) -> None:
        """What is left of a report that was taken apart. Where the disk refuses it is lost: under its old number, which
        the parts have overtaken, the server would pass it over."""
        try:
            spool.replace(path, rest) if rest.items else spool.remove(path)
        except OSError as error:
            log.error("the rest of a report is lost, the spool cannot be written: %s", error)
            self._lose(rest.items)

    def _lose(self, items: list[Item]) -> None:
        self._lost += count_by_kind(items)
        self._owed += dropped_marks(items)

    async def _send(self, client: httpx.AsyncClient, batch: Batch) -> Delivery:
        delivery = await self._post(client, batch)
        told = self.outage.answered if delivery is Delivery.TAKEN else self.outage.in_vain
        told(self._sent_at)
        return delivery

    async def _post(self, client: httpx.AsyncClient, batch: Batch) -> Delivery:
        heartbeat = replace(self._heartbeat(), spool_bytes=self._spool.size_bytes + self._aside.spool.size_bytes)
        body = batch.body(heartbeat)
        self._sent_at = time.monotonic()
        self._heartbeat_due = self._sent_at + self._heartbeat_s
        self._retry_after_s = None
        try:
            answer = await client.post("/v1/node/reports", content=body)
        except httpx.HTTPError as error:
            log.debug("server away: %r", error)
            return Delivery.AWAY
        if answer.status_code == 200:
            return Delivery.TAKEN if self._take_answer(answer) else Delivery.AWAY
        self._retry_after_s = retry_after_s(answer.headers)
        outcome = refusal(answer)
        write = log.error if outcome is Delivery.REJECTED else log.warning
        write("report %d %s: %d %s", batch.seq, outcome.value, answer.status_code, answer.text[:500])
        return outcome

    def _take_answer(self, answer: httpx.Response) -> bool:
        """False for an answer that is not the server's: a captive portal says 200 to everything."""
        try:
            decoded = protocol.decode(NodeAnswer, answer.json())
        except ValueError as error:
            log.warning("the server's answer cannot be read: %s", error)
            return False
        for refused in decoded.refused:
            self._outbox.refuse((refused.attempt_id, refused.epoch))
        return True

    def _without_refused(self, batch: Batch) -> Batch:
        if not any(self._outbox.is_refused(attempt) for attempt in batch.attempts):
            return batch
        return replace(batch, items=[item for item in batch.items if not self._outbox.is_refused(item.attempt)])

    # -------------------------------------------------------------- waiting

    async def _something_to_send(self) -> None:
        waits = [asyncio.ensure_future(self._urgent.wait()), asyncio.ensure_future(self._gathered())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _gathered(self) -> None:
        await self._outbox.filled.wait()
        await asyncio.sleep(max(_GATHER_S, self._sent_at + _EVERY_S - time.monotonic()))

    async def _pause(self) -> None:
        """Back off, for as long as the server asks and then some; a new configuration ends the pause."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_s()):
                await self._urgent.wait()

    def _pause_s(self) -> float:
        first, longest = _BACKOFF_S
        doubled = min(self._failures - 1, _MOST_DOUBLINGS)  # failures go on for hours, and floats end at 2**1023
        pause_s = min(longest, first * 2**doubled) * random.uniform(0.8, 1.2)
        return pause_s + min(self._retry_after_s or 0.0, _RETRY_AFTER_MAX_S)

    def _is_report_due(self) -> bool:
        is_heartbeat_due = time.monotonic() >= self._heartbeat_due
        return len(self._spool) > 0 or self._outbox.filled.is_set() or is_heartbeat_due

    def _save_waiting(self) -> None:
        while self._outbox.filled.is_set():
            self._save(self._outbox.next_batch())

    def _save(self, batch: Batch) -> Path | None:
        """Where it is now; None if nothing was in it, or the disk refused."""
        if not batch.items:
            return None
        try:
            return self._spool.append(batch)
        except OSError as error:
            log.error("reports are lost, the spool cannot be written: %s", error)
            self._lose(batch.items)
            return None
