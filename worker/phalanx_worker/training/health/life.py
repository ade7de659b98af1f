"""The sign of life of a rank that is at work but reports no step: it evaluates, restores or saves.

Owns how often it is given. What is made of it is the node's: its watch for hangs goes by the last step or sign.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import phalanx

GAP_S = 10.0  # far below the minutes without a step that count as a hang


class Life:
    """Gives the sign, at most once in `GAP_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = float("-inf")

    def show(self) -> None:
        now = self._clock()
        if now >= self._due:
            self._due = now + GAP_S
            phalanx.alive()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Before and after what is inside, which is one call and cannot be asked in between."""
        self.show()
        yield
        self.show()


life = Life()
"""This rank's own."""
