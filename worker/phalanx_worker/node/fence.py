"""The node's own leases: without word from the agent and from Ray's GCS for `fence_s`, or without an answer from the
server for `outage_tolerance_s`, its ranks must end.

Owns the clocks of that silence (design: a partitioned node keeps running what the server may give to others, so it has
to stop by itself). Knows no rank: the consequence is passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

CheckGcs = Callable[[], Awaitable[bool]]

_RECENT_S = 30.0  # longer than a report takes to fail and the next to be tried


class Fence:
    """`touch` for each sign of life from the agent; GCS is asked only while the agent is silent."""

    def __init__(self, *, fence_s: float, gcs_alive: CheckGcs | None):
        self.fence_s = fence_s
        self._gcs_alive = gcs_alive
        self._last_contact = time.monotonic()

    def touch(self) -> None:
        self._last_contact = time.monotonic()

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._last_contact

    @property
    def is_over(self) -> bool:
        return self.silent_s >= self.fence_s

    async def keep_leases(self, ping: Callable[[float], None]) -> None:
        """Call `ping(fence_s)` often while there is contact, for guardians, which end their ranks without it.

        So what a runner that hangs has forgotten ends at most half as long again after `fence_s` without contact.
        """
        while True:
            if self.silent_s < self.fence_s / 2:
                ping(self.fence_s)
            await asyncio.sleep(self.fence_s / 16)

    async def run(self, on_cut_off: Callable[[float], None]) -> None:
        """Call `on_cut_off(seconds of silence)` as soon as the lease has run out, again every interval until contact.

        Not later: when `fence_s` is over the server may give the work to others. Only a runner that was stopped itself
        and so has asked nobody asks once before it believes the silence.
        """
        asked_in_vain = False
        while True:
            await asyncio.sleep(self._interval_s())
            if self.silent_s < self.fence_s / 4:
                asked_in_vain = False
                continue
            if asked_in_vain and self.silent_s >= self.fence_s:
                on_cut_off(self.silent_s)
            asked_at = time.monotonic()
            asked_in_vain = not await self._reaches_gcs(self._interval_s())
            if not asked_in_vain:
                self._last_contact = max(self._last_contact, asked_at)

    def _interval_s(self) -> float:
        """Until the next look: never past the end of the lease."""
        left_s = self.fence_s - self.silent_s
        return min(self.fence_s / 8, left_s) if left_s > 0 else self.fence_s / 8

    async def _reaches_gcs(self, timeout_s: float) -> bool:
        if self._gcs_alive is None:
            return False
        with contextlib.suppress(Exception):  # whatever the client raises, it did not answer
            async with asyncio.timeout(timeout_s):
                return await self._gcs_alive()
        return False


class OutageFence:
    """The lease of a whole cluster that is cut off from its server.

    Of each report it is told when it was sent, and whether it was answered. As in `Fence`, a runner that was stopped
    itself has asked nobody, so the silence alone is not believed: a report must have been in vain lately.
    """

    def __init__(self, *, tolerance_s: float):
        self.tolerance_s = tolerance_s
        self._answered_at = time.monotonic()
        self._in_vain_at = float("-inf")

    def answered(self, sent_at: float) -> None:
        self._answered_at = max(self._answered_at, sent_at)

    def in_vain(self, sent_at: float) -> None:
        self._in_vain_at = max(self._in_vain_at, sent_at)

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._answered_at

    @property
    def is_over(self) -> bool:
        return self.silent_s >= self.tolerance_s and time.monotonic() - self._in_vain_at < _RECENT_S

    async def run(self, on_cut_off: Callable[[float], None]) -> None:
        """Call `on_cut_off(seconds of silence)` from the end of the lease on, again and again until an answer."""
        while True:
            await asyncio.sleep(min(1.0, self.tolerance_s / 8))
            if self.is_over:
                on_cut_off(self.silent_s)
