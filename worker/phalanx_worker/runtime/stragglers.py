"""Ranks that do nothing any more while others of their group are done: hung for good, and their gang with them.

Owns the rule: from the first clean exit on, a rank whose processes use no CPU time at all for `straggler_s` is one.
Only its owner knows whether that is true of a job: a healthy rank may well wait for hours for one on another node. So
the rule is off (0) unless a job asks for it. Pure: the figures are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

_LOOKS = 10  # in `straggler_s`


@dataclass
class Stillness:
    cpu_ticks: int
    since: float


class Stragglers:
    """`look_at` is when to look next; None until a rank exited cleanly, and always where `straggler_s` is 0."""

    def __init__(self, straggler_s: float):
        self.look_at: float | None = None
        self._straggler_s = straggler_s
        self._still: dict[int, Stillness] = {}

    def begin(self, now: float) -> None:
        if self.look_at is None and self._straggler_s > 0:
            self.look_at = now

    def is_due(self, now: float) -> bool:
        return self.look_at is not None and now >= self.look_at

    def look(self, now: float, cpu_ticks: dict[int, int]) -> list[int]:
        """Which of the living ranks (pid -> CPU time that their processes used) are stragglers; again at each look."""
        interval_s = self._straggler_s / _LOOKS
        if self.look_at is not None and now - self.look_at > interval_s:  # who looks was stopped, and the ranks perhaps
            self._still.clear()
        self.look_at = now + interval_s
        found = []
        for pid, ticks in cpu_ticks.items():
            still = self._still.get(pid)
            if still is None or still.cpu_ticks != ticks:
                self._still[pid] = Stillness(ticks, now)
            elif now - still.since >= self._straggler_s:
                found.append(pid)
        return found
