"""How often to look: at once at what comes alone, and seldom at what comes in crowds."""

from __future__ import annotations

import asyncio
import time


class Pace:
    """`burst` turns are free, then one comes every `every_s`; turns that are not taken are saved up, to `burst`.

    Each look at a busy cluster costs the same, however much is new: paced, it finds more at once.
    """

    def __init__(self, *, burst: int, every_s: float) -> None:
        self._saved_s = (burst - 1) * every_s
        self._every_s = every_s
        self._due_s = 0.0  # monotonic, of the next turn if none were saved up

    async def turn(self) -> None:
        """Wait until it is time."""
        now_s = time.monotonic()
        due_s = max(self._due_s, now_s)
        self._due_s = due_s + self._every_s
        await asyncio.sleep(max(0.0, due_s - self._saved_s - now_s))
