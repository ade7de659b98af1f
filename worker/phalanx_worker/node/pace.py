"""How fast the ranks of one group take their steps, and since when they take none.

Owns the rule of a hang: no rank of the group reports a new step for `factor` times the median time between its reports
and for `at_least_s`, nor gives another sign of life. Pure: times are passed in, on one clock. A group of which nobody
reports steps is never hung.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from phalanx_worker.protocol import Health

_KNOWN = 5  # intervals, before there is a median that says something
_WINDOW = 64
_EARLY = 6  # times `at_least_s`, as long as the median is not known: the first steps may compile
_LOOK_S = 5.0  # who looks less often was stopped, and the ranks perhaps with it


class Pace:
    """`hung_s` is the answer of the last look: for how long there was no step, 0 while all goes well."""

    def __init__(self, rule: Health) -> None:
        self.hung_s = 0.0
        self.steps: dict[int, int] = {}  # by rank, as far as they came
        self._rule = rule
        self._intervals: deque[float] = deque(maxlen=_WINDOW)
        self._newest = -1
        self._moved_at: float | None = None
        self._looked_at: float | None = None
        self._is_finished = False

    @property
    def median_s(self) -> float:
        """Between two reports of a new step; 0 while that is not known."""
        return median(self._intervals) if len(self._intervals) >= _KNOWN else 0.0

    def step(self, rank: int, step: int, now: float) -> None:
        """A rank says how far it is. Only what is further than any rank was shows that the group goes on; a job that
        has been rolled back repeats steps, which shows it as well."""
        if step == self.steps.get(rank):
            return
        went_back = step < self.steps.get(rank, -1)
        self.steps[rank] = step
        if step > self._newest or went_back:
            if self._moved_at is not None:
                self._intervals.append(now - self._moved_at)
            self._newest = step
            self.moved(now)

    def moved(self, now: float) -> None:
        """Something shows that the group goes on: a step, a checkpoint, or its word."""
        self._moved_at, self.hung_s = now, 0.0

    def finish(self) -> None:
        """The job says that its work is complete: what it still does takes no steps."""
        self._is_finished, self.hung_s = True, 0.0

    def look(self, now: float) -> bool:
        """Is it hung, and was not at the last look?"""
        if self._looked_at is not None and now - self._looked_at > _LOOK_S and self._moved_at is not None:
            self._moved_at += now - self._looked_at
        self._looked_at = now
        if self._rule.hang == "off" or self._moved_at is None or self._is_finished:
            return False
        before, idle_s, patience_s = self.hung_s, now - self._moved_at, self._rule.hang_at_least_s
        if idle_s > (max(patience_s, self._rule.hang_factor * self.median_s) if self.median_s else _EARLY * patience_s):
            self.hung_s = idle_s
        return not before and self.hung_s > 0

    @property
    def laggard(self) -> int | None:
        """The one rank that is behind all others; None if there is no such one."""
        behind = min(self.steps.values(), default=0)
        ranks = [rank for rank, step in self.steps.items() if step == behind]
        return ranks[0] if len(ranks) == 1 < len(self.steps) else None
