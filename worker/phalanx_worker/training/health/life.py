"""The sign of life of a rank that is at work but reports no step: it evaluates, restores or saves.

Owns when it is given: as work goes on, at most so often. In a restore or save a thread looks on. As long as this rank
is at the storage itself, only bytes that come through are life, so that a storage that hangs is found; while it waits
for the other ranks, whose nodes look after them, waiting is, for the 30 minutes that their collectives wait too. What
is made of the sign is the node's: its watch for hangs goes by the last step or sign.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import phalanx

GAP_S = 10.0  # far below the minutes without a step that count as a hang
LOOK_S = 5.0
LONGEST_WAIT_S = 1800.0  # of a rank for the others
PIECE_BYTES = 64 << 20  # read or written at a time: in the 5 minutes of a hang 0.2 MiB/s bring it through


class Life:
    """Gives the sign, at most once in `GAP_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = float("-inf")
        self._pieces = self._seen = 0  # that came through, and of them those that were noticed
        self._seen_at = float("-inf")
        self._is_at_storage = False

    def show(self) -> None:
        now = self._clock()
        if now >= self._due:
            self._due = now + GAP_S
            phalanx.alive()

    def moved(self) -> None:
        """A piece has come through to or from the storage. From any thread."""
        self._pieces += 1

    @contextmanager
    def at_storage(self) -> Iterator[None]:
        """This rank reads or writes its own share: from one thread at a time."""
        self._is_at_storage = True
        try:
            yield
        finally:
            self._is_at_storage = False

    @contextmanager
    def around(self) -> Iterator[None]:
        """Before, during and after what is inside, which is one call that may take long."""
        self.show()
        self._seen, self._seen_at = self._pieces, self._clock()
        over = threading.Event()
        looking = threading.Thread(target=self._look_on, args=(over,), name="phalanx-life", daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()
        self.show()

    def _look_on(self, over: threading.Event) -> None:
        while not over.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Give the sign if there is life."""
        pieces, now = self._pieces, self._clock()
        if pieces != self._seen:
            self._seen, self._seen_at = pieces, now
            self.show()
        elif not self._is_at_storage and now - self._seen_at < LONGEST_WAIT_S:
            self.show()


life = Life()
"""This rank's own."""
