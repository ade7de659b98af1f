"""The ten lines around every loop: tick, wait, tick again, whatever happens in between.

Owns the clock that ticks are given and what becomes of an error: it is logged, and the loop goes on after a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import structlog

log = structlog.get_logger()

PAUSE_AFTER_ERROR_S = 1.0


async def tick_forever(
    tick: Callable[[datetime], Awaitable[Any]], wait: Callable[[], Awaitable[Any]], *, name: str
) -> None:
    """Until cancelled: `tick(now)`, then `wait()`. An error costs one tick, never the loop."""
    while True:
        try:
            await tick(datetime.now(UTC))
        except Exception:
            log.exception("tick failed", loop=name)
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)
        await wait()
