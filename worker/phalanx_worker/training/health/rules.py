"""When a run of numbers is sick: pure rules, one small object or function each.

They own what they remember of past steps. They refuse to know ranks, torch, and what is done about a finding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import itemgetter
from typing import Any

FIRST_LOSSES = 8  # fewer say nothing about what is usual
LEAST_DEVIATION = 1e-3  # of the median: losses that hardly move are no measure of what a spike is
SMOOTH_STEPS = 32  # of the median that divergence goes by


class Spikes:
    """A loss over the median of the last `window` ones by more than `factor` times their median absolute deviation
    (MAD; Hampel 1974, JASA 69, 383-393)."""

    def __init__(self, *, factor: float, window: int) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._every = max(1, window // 8)  # steps between looks at the whole window: it changes slowly
        self._new = 0
        self.limit = float("inf")  # the largest loss that is no spike now; infinite as long as too few are known

    def _limit(self) -> float:
        if len(self._losses) < FIRST_LOSSES:
            return float("inf")
        middle = _median(self._losses)
        deviation = _median([abs(loss - middle) for loss in self._losses])
        return middle + self._factor * max(deviation, LEAST_DEVIATION * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Whether this finite loss is one. It is not remembered."""
        return loss > self.limit

    def remember(self, loss: float) -> None:
        if not isfinite(loss):
            return
        self._losses.append(loss)
        self._new += 1
        if self._new >= self._every:
            self.limit, self._new = self._limit(), 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "new": self._new, "limit": self.limit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state["losses"])  # the last ones, where the window is smaller now
        self._new, self.limit = state["new"], state["limit"]


class Divergence:
    """A smoothed loss (the median of the last 32) that stays over `factor` times its lowest value for `steps` steps."""

    def __init__(self, *, factor: float, steps: int) -> None:
        self._factor, self._steps = factor, steps
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._recent: deque[tuple[int, float]] = deque()  # step and loss
        self._sorted: list[float] = []  # the losses
        self._step = self._began = 0  # counted here; the first step of the rise, or of one that would show next
        self.lowest = float("inf")
        self.over = 0  # steps in a row

    def remember(self, loss: float) -> bool:
        """Takes the next loss; whether training has diverged by now."""
        self._step += 1
        if not isfinite(loss):
            return False
        self._take(loss)
        smooth = _middle(self._sorted)
        if smooth > self._limit:
            self.over += 1
        else:
            self.over, self._began = 0, self._recent[len(self._recent) // 2][0]
        if len(self._recent) >= FIRST_LOSSES:
            self.lowest = min(self.lowest, smooth)
        return self.over >= self._steps

    def _take(self, loss: float) -> None:
        if len(self._recent) == SMOOTH_STEPS:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft()[1])]
        self._recent.append((self._step, loss))
        insort(self._sorted, loss)

    @property
    def steps_since(self) -> int:
        """How many steps ago it began, the last one included: the median turns half its window later than the loss.
        As long as nothing has risen, of a rise that would show next."""
        return self._step - self._began + 1

    def state_dict(self) -> dict[str, Any]:
        counts = {"step": self._step, "began": self._began, "over": self.over}
        return {"recent": list(self._recent), "lowest": self.lowest, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent = deque(state["recent"])
        self._sorted = sorted(loss for _, loss in self._recent)
        self._step, self._began, self.over = state["step"], state["began"], state["over"]
        self.lowest = state["lowest"]

    @property
    def _limit(self) -> float:
        return self.lowest + (self._factor - 1) * abs(self.lowest)  # also right for losses below 0


class Edge:
    """Tells a condition once when it begins, and again only after it was over."""

    def __init__(self) -> None:
        self._held: object = None

    def begins(self, what: object) -> bool:
        """`what` holds now; None or False where nothing does."""
        new = bool(what) and what != self._held
        self._held = what
        return new


@dataclass(frozen=True)
class Odd:
    """Replicas that do not have what most have. `members` are suspects: the ones to blame where `decided`, all that
    differ from each other where there is no majority."""

    members: tuple[int, ...]
    decided: bool


def odd_ones(values: Sequence[object]) -> Odd | None:
    """Which of the replicas' values differ from those of more than half of them; None where all are alike."""
    if len(set(values)) <= 1:
        return None
    ((common, count),) = Counter(values).most_common(1)
    if 2 * count > len(values):
        return Odd(tuple(i for i, value in enumerate(values) if value != common), decided=True)
    return Odd(tuple(range(len(values))), decided=False)


def farthest_out(values: Sequence[float], *, usual: float, factor: float = 100.0) -> int | None:
    """Which of differing values is out of all proportion: not finite, or more than `factor` times the `usual`
    magnitude, when no other is. None where that cannot be said."""
    out = [i for i, value in enumerate(values) if not isfinite(value) or abs(value) > factor * usual]
    return out[0] if len(out) == 1 else None


def slow_rank(
    work_s: Sequence[float], *, factor: float, alike: Sequence[Sequence[int]] | None = None
) -> tuple[int, float] | None:
    """The rank whose own work takes the most times the median of its like, and how many, where that is `factor` or
    more. `alike`: the ranks that have the same work to do, such as those of one stage of a pipeline; None: all. Of two
    ranks the median is the faster one; a rank without its like is never slow, since there is nothing to compare it
    with."""
    groups = [range(len(work_s))] if alike is None else alike
    ratios = [_slowest(work_s, ranks) for ranks in groups if len(ranks) > 1]
    rank, ratio = max(ratios, key=itemgetter(1), default=(0, 0.0))
    return (rank, ratio) if ratio >= factor else None


def _slowest(work_s: Sequence[float], ranks: Sequence[int]) -> tuple[int, float]:
    """Of these ranks; and how many times their median its work takes."""
    ordered = sorted(work_s[rank] for rank in ranks)
    usual = ordered[(len(ordered) - 1) // 2]
    slowest = max(ranks, key=work_s.__getitem__)
    return slowest, work_s[slowest] / usual if usual > 0 else 1.0


def _median(values: Iterable[float]) -> float:
    """As `statistics.median`, at a third of its time."""
    return _middle(sorted(values))


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
