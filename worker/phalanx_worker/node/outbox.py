"""What waits to be sent to the server, in memory: log chunks, metric points and marks, already as JSON text.

Owns the numbering of batches and the bound on memory: over it, metrics go first, then logs, marks only when they alone
are too much, and each loss is counted and reported as a `dropped` mark. Knows neither disk nor network.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from phalanx_worker import protocol
from phalanx_worker.protocol import Fill, LogChunk, Mark, MetricPoint

MAX_BATCH_BYTES = 2 << 20  # well below the 4 MiB that the server takes
MAX_WAITING_BYTES = 16 << 20
SEQ_STEP = 1 << 16  # between the numbers of batches: room for the parts of one that must be taken apart
KINDS = ("logs", "metrics", "marks")
GIVEN_UP_IN_ORDER = ("metrics", "logs", "marks")

_IS_DROPPED = '"kind": "dropped"'

AttemptKey = tuple[str, int]  # attempt id, epoch


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk, point or mark. `kind` is the field of NodeReport that it goes into."""

    kind: str
    attempt: AttemptKey
    text: str
    rank: int = 0

    @property
    def tells_of_losses(self) -> bool:
        """A `dropped` mark, or what looks like one."""
        return self.kind == "marks" and _IS_DROPPED in self.text


@dataclass(frozen=True)
class Batch:
    """A numbered set of items; the server takes each number of a boot once, so a batch may be sent again.

    `postponed`: how often others were let go before it, because the server failed over it.
    """

    boot: str
    seq: int
    items: list[Item] = field(default_factory=list)
    postponed: int = 0

    def body(self, heartbeat: protocol.Heartbeat | None) -> bytes:
        """The JSON of the NodeReport. The items are JSON already: a batch of 10,000 points is joined, not encoded."""
        head = {"boot": self.boot, "seq": self.seq, "sent_at": time.time()}
        head["heartbeat"] = protocol.encode(heartbeat) if heartbeat else None
        lists = (f'"{kind}":[{",".join(item.text for item in self.items if item.kind == kind)}]' for kind in KINDS)
        return f"{json.dumps(head)[:-1]},{','.join(lists)}}}".encode()

    @property
    def attempts(self) -> set[AttemptKey]:
        return {item.attempt for item in self.items}

    @property
    def kinds(self) -> set[str]:
        return {item.kind for item in self.items}


def to_item(message: LogChunk | MetricPoint | Mark) -> Item:
    kind = "logs" if isinstance(message, LogChunk) else "metrics" if isinstance(message, MetricPoint) else "marks"
    # These messages are flat, so their fields are their JSON; protocol.encode would copy each of them deeply.
    return Item(kind, (message.attempt_id, message.epoch), json.dumps(vars(message)), message.rank)


def dropped_marks(items: Iterable[Item]) -> list[Item]:
    """What `Losses` says of items that are given up."""
    losses = Losses()
    losses.add(items)
    return losses.marks()


def count_by_kind(items: Iterable[Item]) -> Counter[str]:
    """But for `dropped` marks: what they tell of was counted when it was given up."""
    return Counter(item.kind for item in items if not item.tells_of_losses)


class Losses:
    """Items given up, counted by attempt, rank and kind; a `dropped` mark among them counts as what it says."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[AttemptKey, int, str]] = Counter()
        self._sizes: Counter[tuple[AttemptKey, int, str]] = Counter()

    def add(self, items: Iterable[Item]) -> None:
        for item in items:
            told = _told(item) if item.tells_of_losses else None
            what, count, size_bytes = told or (item.kind, 1, len(item.text))
            self._counts[item.attempt, item.rank, what] += count
            self._sizes[item.attempt, item.rank, what] += size_bytes

    def update(self, others: Losses) -> None:
        self._counts.update(others._counts)
        self._sizes.update(others._sizes)

    def marks(self) -> list[Item]:
        """One `dropped` mark for each attempt, rank and kind."""
        return [_dropped_mark(*key, count=count, size_bytes=self._sizes[key]) for key, count in self._counts.items()]


def _told(item: Item) -> tuple[str, int, int] | None:
    """What a `dropped` mark tells; None for another mark, or one that a rank made up."""
    mark = json.loads(item.text)
    what, count, size_bytes = (mark["data"].get(name) for name in ("what", "count", "bytes"))
    if mark["kind"] != "dropped" or what not in KINDS or not isinstance(count, int):
        return None
    return what, count, size_bytes if isinstance(size_bytes, int) else 0


def _dropped_mark(attempt: AttemptKey, rank: int, what: str, *, count: int, size_bytes: int) -> Item:
    data: dict[str, Any] = {"what": what, "count": count, "bytes": size_bytes}
    return to_item(Mark(attempt[0], attempt[1], rank=rank, kind="dropped", at=time.time(), data=data))


class Outbox:
    """A bounded queue. `filled` is set while something waits."""

    def __init__(self, boot: str, *, limit_bytes: int = MAX_WAITING_BYTES):
        self.filled = asyncio.Event()
        self._boot = boot
        self._last_seq = 0
        self._limit_bytes = limit_bytes
        self._items: deque[Item] = deque()
        self._size_bytes = 0
        self._refused: set[AttemptKey] = set()
        self.dropped: Counter[str] = Counter()
        """How many items were given up, by kind."""

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def fill(self) -> Fill:
        return Fill(self._size_bytes, self._limit_bytes)

    def put(self, message: LogChunk | MetricPoint | Mark) -> None:
        self.put_item(to_item(message))

    def put_item(self, item: Item) -> None:
        if item.attempt in self._refused:
            return
        self._items.append(item)
        self._size_bytes += len(item.text)
        self.filled.set()
        if self._size_bytes > self._limit_bytes:
            self._shrink()

    def holds(self, attempt: AttemptKey) -> bool:
        return any(item.attempt == attempt for item in self._items)

    def next_batch(self) -> Batch:
        """The oldest items, as many as one report takes, at least one. Empty if none waits, for a heartbeat alone."""
        items: list[Item] = []
        size = 0
        while self._items and (not items or size + len(self._items[0].text) <= MAX_BATCH_BYTES):
            item = self._items.popleft()
            items.append(item)
            size += len(item.text)
        self._size_bytes -= size
        if not self._items:
            self.filled.clear()
        return self.number(items)

    def number(self, items: list[Item], *, postponed: int = 0) -> Batch:
        """A batch after all that were numbered before."""
        self._last_seq += SEQ_STEP
        return Batch(self._boot, self._last_seq, items, postponed)

    def refuse(self, attempt: AttemptKey) -> None:
        """Forget what waits of an attempt that the server does not take, and take no more of it."""
        self._refused.add(attempt)
        self._keep([item for item in self._items if item.attempt != attempt])

    def forget(self, attempt: AttemptKey) -> None:
        self._refused.discard(attempt)

    def is_refused(self, attempt: AttemptKey) -> bool:
        return attempt in self._refused

    def _shrink(self) -> None:
        """Give up the oldest metrics, if that is not enough the oldest logs, then marks, down to half the bound."""
        kept, lost = shrink(self._items, target_bytes=self._limit_bytes // 2)
        self.dropped += count_by_kind(lost)
        self._keep([*dropped_marks(lost), *kept])

    def _keep(self, items: list[Item]) -> None:
        self._items = deque(items)
        self._size_bytes = sum(len(item.text) for item in items)
        self.filled.set() if items else self.filled.clear()


def shrink(items: Iterable[Item], *, target_bytes: int) -> tuple[list[Item], list[Item]]:
    """Split into what stays and what is given up: oldest metrics first, then oldest logs, marks last."""
    kept = list(items)
    lost: list[Item] = []
    size = sum(len(item.text) for item in kept)
    for kind in GIVEN_UP_IN_ORDER:
        remaining = []
        for item in kept:
            if size > target_bytes and item.kind == kind:
                size -= len(item.text)
                lost.append(item)
            else:
                remaining.append(item)
        kept = remaining
    return kept, lost
