"""A batch taken apart until the items are found that the server does not take.

Owns which part is sent next, under which number, and what is given up. Pure: knows no network.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from phalanx_worker.node.outbox import Batch, Item

MOST_REJECTED = 64  # parts of one batch; after that what is rejected is given up without looking for the item in it


class Halves:
    """Of one batch. Each part gets the next number, sent again or not: one whose answer got lost may be taken."""

    def __init__(self, batch: Batch):
        self.lost: list[Item] = []
        self._batch = batch
        self._seq = batch.seq
        self._rejected = 0
        self._parts: deque[list[Item]] = deque([batch.items])

    def nothing(self) -> Batch:
        """A part without items, for a heartbeat alone."""
        self._seq += 1
        return Batch(self._batch.boot, self._seq)

    def next(self) -> Batch | None:
        """The part to send now; None when all are taken or given up."""
        if not self._parts:
            return None
        self._seq += 1
        return Batch(self._batch.boot, self._seq, self._parts[0])

    def taken(self) -> None:
        self._parts.popleft()

    def rejected(self) -> None:
        """Split the part in two, or give it up where that cannot be."""
        self._rejected += 1
        items = self._parts.popleft()
        if len(items) <= 1 or self._rejected > MOST_REJECTED:
            self.lost += items
        else:
            middle = len(items) // 2
            self._parts.extendleft([items[middle:], items[:middle]])

    def rest(self) -> Batch:
        """What is neither taken nor given up, as one batch again, under a number that is free."""
        return replace(self._batch, seq=self._seq + 1, items=[item for part in self._parts for item in part])
