"""Which holds are news: what the last passes said of each waiting job, and what of it is stored.

Owns the comparison. Whatever is news of a kept place is stored at once: who stops for a job stops for that place. Then
a job whose reason changed comes first, then those whose words changed. At most `limit` of these holds per commit are
news, so that a plan about a hundred thousand jobs costs the database little at a time; each time it is the turn of
those behind the last that had one, so that words which change in every pass keep nobody from theirs.

What is stored of a job is read by its tenant's viewers: it names jobs of that tenant and of those below it, and only
counts others' (docs/decisions/0009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import isfinite
from typing import Any
from uuid import UUID

import structlog

from phalanx_server.domain.access import covers
from phalanx_server.domain.reason import date_of
from phalanx_server.scheduling.plan import HoldGroup, Plan
from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.store.holds import HoldRow

log = structlog.get_logger()

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


@dataclass(frozen=True, slots=True)
class News:
    """A hold that is not stored yet; `place` is the job's among all that wait, in queue order."""

    place: int
    job: str
    group: HoldGroup
    words: Words


class Rota:
    """Takes a bounded number of what is offered in queue order, and goes on next time behind the last that it took."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last = -1
        self._behind: list[News] = []
        self._before: list[News] = []

    def offer(self, news: News) -> None:
        wanted = self._behind if news.place > self._last else self._before
        if len(wanted) < self._limit:
            wanted.append(news)

    def take(self, most: int) -> list[News]:
        """At most so many of what was offered since the last time."""
        taken = (self._behind + self._before)[:most]
        self._behind, self._before = [], []
        if taken:
            self._last = taken[-1].place
        return taken


class HoldBook:
    """Knows what is stored of every queued job. Loaded on election, told of every commit."""

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._stored: dict[str, Words] = {}
        self._interned: dict[Words, Words] = {}
        self._reasons, self._others = Rota(limit), Rota(limit)

    @property
    def jobs(self) -> int:
        """Of how many it knows what is stored."""
        return len(self._stored)

    @property
    def words(self) -> int:
        """How many different ones it keeps; over WORDS_MAX those that nobody has are forgotten."""
        return len(self._interned)

    def load(self, rows: Iterable[Any]) -> None:
        """Start from the stored holds (`store.holds.load_holds`)."""
        self._stored.clear()
        self._interned.clear()
        for row in rows:
            estimate = _steps(row.estimated_start.timestamp() if row.estimated_start else None)
            self._stored[row.job_id.hex] = self._intern(Words(row.reason, row.message, tuple(row.unblocks), estimate))

    def news(
        self,
        plan: Plan,
        *,
        kept: Mapping[str, Seat] | None = None,
        tenant_of: Callable[[str], str | None] = lambda job: None,
    ) -> list[tuple[HoldRow, Words]]:
        """The holds to store: those about a kept place, and at most `limit` others; call `stored` with them once they
        are. `kept` is what was stored of such places when the pass began. A job of which `tenant_of` knows nothing is
        named to nobody."""
        kept = kept or {}
        claims: list[News] = []
        places = count()
        for group in plan.hold_groups:
            words = self._words(group, tenant_of)
            for job, place in zip(group.jobs, places, strict=False):
                if (kept or group.kept) and kept.get(job) != group.kept:
                    claims.append(News(place, job, group, words))
                    continue
                known = self._stored.get(job)
                if known is words:
                    continue
                rota = self._reasons if known is None or known.reason != words.reason else self._others
                rota.offer(News(place, job, group, words))
        first = self._reasons.take(self._limit)
        others = self._others.take(self._limit - len(first))
        return [(_row(news), news.words) for news in claims + first + others]

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

    def _words(self, group: HoldGroup, tenant_of: Callable[[str], str | None]) -> Words:
        """What is said of a group, whose jobs are of one tenant. A cause that cannot be put into words costs its own
        jobs their words, not a pass."""
        why = group.explanation
        try:
            own = tenant_of(group.jobs[0])
            why = why.hiding(lambda job: not _may_name(own, tenant_of(job)))
            return self._intern(Words(why.reason.value, why.message(), why.unblocks(), _steps(group.estimated_start)))
        except Exception:
            words = Words(
                why.reason.value, f"waits ({why.reason.value}); the details could not be put into words", (), None
            )
            if words not in self._interned:
                log.exception("hold without words", reason=why.reason.value, job=group.jobs[0])
            return self._intern(words)

    def _intern(self, words: Words) -> Words:
        return self._interned.setdefault(words, words)


def _may_name(own: str | None, other: str | None) -> bool:
    """Whether everybody who sees jobs of tenant `own` sees those of `other`. None = not known."""
    return own is not None and other is not None and covers(own, other)


def _row(news: News) -> HoldRow:
    words, start = news.words, news.group.estimated_start
    estimated = None if start is None or words.estimate is None else date_of(start)
    return HoldRow(UUID(hex=news.job), words.reason, words.message, words.unblocks, estimated, news.group.kept)


def _steps(at_s: float | None) -> int | None:
    """None, too, for a time that never comes."""
    return round(at_s / ESTIMATE_STEP_S) if at_s is not None and isfinite(at_s) else None
