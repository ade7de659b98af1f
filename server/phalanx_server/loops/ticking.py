"""The ten lines around every loop: tick, wait, tick again, whatever happens in between.

Owns the clock that ticks are given and what becomes of an error: it is logged, and the loop goes on after a pause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

log = structlog.get_logger()

PAUSE_AFTER_ERROR_S = 1.0


@dataclass
class Pulse:
    """How a loop is doing, for whoever looks from outside. `failing`: how many ticks in a row have failed, after each
    of which it pauses; `ticked_at_s` is the monotonic time of the last that did not."""

    failures: int = 0
    failing: int = 0
    ticked_at_s: float | None = None

    def ticked(self) -> None:
        self.failing = 0
        self.ticked_at_s = time.monotonic()

    def failed(self) -> None:
        self.failing += 1
        self.failures += 1


class Pace:
    """`burst` turns are free, then one comes every `every_s`; turns that are not taken are saved up, to `burst`. So
    what comes alone is ticked for at once, and what comes in crowds is taken together."""

    def __init__(self, *, burst: int, every_s: float) -> None:
        self._saved_s = (burst - 1) * every_s
        self._every_s = every_s
        self._due_s = 0.0  # monotonic, of the next turn if none were saved up

    async def turn(self) -> None:
        now_s = time.monotonic()
        due_s = max(self._due_s, now_s)
        self._due_s = due_s + self._every_s
        await asyncio.sleep(max(0.0, due_s - self._saved_s - now_s))


async def tick_forever(
    tick: Callable[[datetime], Awaitable[Any]],
    wait: Callable[[], Awaitable[Any]],
    *,
    name: str,
    pulse: Pulse | None = None,
) -> None:
    """Until cancelled: `tick(now)`, then `wait()`. An error costs one tick, never the loop. `pulse` is told of both."""
    pulse = pulse or Pulse()
    while True:
        try:
            await tick(datetime.now(UTC))
            pulse.ticked()
        except Exception:
            pulse.failed()
            log.exception("tick failed", loop=name)
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)
        await wait()
