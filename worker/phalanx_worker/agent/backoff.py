"""Waiting between tries of something that fails: longer each time, and without filling the log."""

from __future__ import annotations

import asyncio
import logging
import random

log = logging.getLogger("phalanx.agent")

BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONGEST_ASKED_S = 30.0


class Backoff:
    """Sleeps longer from one failure to the next; says so once when trouble starts and once when it is over."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failures = 0

    async def failed(self, error: Exception, *, at_least_s: float | None = None) -> None:
        """Wait for as long as is asked for (up to LONGEST_ASKED_S), and then some."""
        if self._failures == 0:
            log.warning("%s fails, retrying: %s", self._what, error)
        delay_s = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1
        await asyncio.sleep(min(at_least_s or 0.0, LONGEST_ASKED_S) + delay_s * random.uniform(0.5, 1.0))

    def succeeded(self) -> None:
        if self._failures:
            log.info("%s works again after %d failures", self._what, self._failures)
        self._failures = 0
