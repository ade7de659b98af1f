"""Logs that the server's storage cannot take for now, on disk, while everything else goes its way.

Owns when they are tried again, and their order: while any are here, newer logs queue behind them. They need no number
of their own, because the server knows each piece by its offset: they get a fresh one with each try. Knows no network.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phalanx_worker.node.outbox import Batch, Item, count_by_kind, dropped_marks
from phalanx_worker.node.spool import Spool

log = logging.getLogger("phalanx.node.link")

RETRY_S = 2.0
LONGEST_RETRY_S = 30.0


class Aside:
    """`number` makes a batch after all that were numbered before; `put` takes what turns up here and is no log."""

    def __init__(self, spool: Spool, number: Callable[[list[Item]], Batch], put: Callable[[Item], None]):
        self.spool = spool
        self._number = number
        self._put = put
        self._again_at = 0.0  # monotonic
        self.dropped: Counter[str] = Counter()
        """How many items the disk did not take."""

    @property
    def is_due(self) -> bool:
        return len(self.spool) > 0 and time.monotonic() >= self._again_at

    def wait(self, retry_after_s: float | None) -> None:
        """The storage is away: not before so long."""
        self._again_at = time.monotonic() + min(LONGEST_RETRY_S, max(RETRY_S, retry_after_s or 0.0))

    def add(self, logs: Batch) -> list[Item]:
        """Put logs behind those that are here. Where the disk refuses, they are lost: the `dropped` marks to send."""
        try:
            self.spool.append(logs)
            return []
        except OSError as error:
            log.error("logs are lost, neither the storage nor the spool can take them: %s", error)
            self.dropped += count_by_kind(logs.items)
            return dropped_marks(logs.items)

    def oldest(self) -> tuple[Path, Batch] | None:
        """The logs to try next."""
        stored = self.spool.oldest()
        if stored is None:
            return None
        path, batch = stored
        rest, logs = without_logs(batch)
        if rest.items:  # `dropped` marks of a spool that was full: they need a number that stays
            self.spool.replace(path, logs or replace(batch, items=[]))
            for item in rest.items:
                self._put(item)
        return path, self._number(logs.items if logs else [])


def without_logs(batch: Batch) -> tuple[Batch, Batch | None]:
    """The batch without its logs, under its own number, and the logs, if there are any."""
    logs = [item for item in batch.items if item.kind == "logs"]
    if not logs:
        return batch, None
    return replace(batch, items=[item for item in batch.items if item.kind != "logs"]), replace(batch, items=logs)
