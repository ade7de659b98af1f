"""Which holds are news: what the last passes said of each waiting job, and what of it is stored.

Owns the comparison. A job whose reason changed comes first; then, oldest news first, those whose words changed. At most
`limit` holds per commit are news, so that a plan about a hundred thousand jobs costs the database little at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from phalanx_server.scheduling.plan import HoldGroup, Plan
from phalanx_server.store.holds import HoldRow

LIMIT = 2_000
WORDS_MAX = 10_000
# An expected start that moves by less than this is no news.
ESTIMATE_STEP_S = 10


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a job. `estimate` counts ESTIMATE_STEP_S; equal words are one object (`HoldBook` interns)."""

    reason: str
    message: str
    unblocks: tuple[str, ...]
    estimate: int | None


class HoldBook:
    """Knows what is stored of every queued job. Loaded on election, told of every commit."""

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._stored: dict[str, Words] = {}
        self._interned: dict[Words, Words] = {}

    def load(self, rows: Iterable[Any]) -> None:
        """Start from the stored holds (`store.holds.load_holds`)."""
        self._stored.clear()
        self._interned.clear()
        for row in rows:
            estimate = _steps(row.estimated_start.timestamp() if row.estimated_start else None)
            self._stored[row.job_id.hex] = self._intern(Words(row.reason, row.message, tuple(row.unblocks), estimate))

    def news(self, plan: Plan) -> list[tuple[HoldRow, Words]]:
        """The holds to store, at most `limit`; call `stored` with them once they are."""
        reasons: list[tuple[HoldRow, Words]] = []
        others: list[tuple[HoldRow, Words]] = []
        for group in plan.hold_groups:
            words = self._words(group)
            for job in group.jobs:
                known = self._stored.get(job)
                if known is words:
                    continue
                wanted = reasons if known is None or known.reason != words.reason else others
                if len(wanted) < self._limit:
                    wanted.append((_row(job, group, words), words))
        return (reasons + others)[: self._limit]

    def stored(self, news: Sequence[tuple[HoldRow, Words]], *, over: Iterable[str]) -> None:
        """These were stored; those that are `over` (started, cancelled) have no hold any more."""
        for row, words in news:
            self._stored[row.job_id.hex] = words
        for job in over:
            self._stored.pop(job, None)

    def keep(self, queued: Mapping[str, Any]) -> None:
        """Forget jobs that are not queued any more, and words that nobody has."""
        if len(self._stored) > len(queued):
            self._stored = {job: words for job, words in self._stored.items() if job in queued}
        if len(self._interned) > WORDS_MAX:
            self._interned = {words: words for words in self._stored.values()}

    def _words(self, group: HoldGroup) -> Words:
        why = group.explanation
        return self._intern(Words(why.reason.value, why.message(), why.unblocks(), _steps(group.estimated_start)))

    def _intern(self, words: Words) -> Words:
        return self._interned.setdefault(words, words)


def _row(job: str, group: HoldGroup, words: Words) -> HoldRow:
    start = group.estimated_start
    estimated = None if start is None else datetime.fromtimestamp(start, UTC)
    return HoldRow(UUID(hex=job), words.reason, words.message, words.unblocks, estimated)


def _steps(at_s: float | None) -> int | None:
    return None if at_s is None else round(at_s / ESTIMATE_STEP_S)
