"""Owns the prediction of run times from the history of jobs that ended, and the record of how good predictions were.

Refuses to know the clock, the queue, and where the history is kept: `observe` is told of each end, live as in a replay.

* Each job belongs to several groups, from its very own kind (tenant, user, name, GPUs and time limit) to all jobs. Of
  each group the last `WINDOW` run times are kept: recent ones say more than many (Tsafrir, Etsion and Feitelson, TPDS
  2007, average just the user's last two).
* Each group predicts for itself, and whichever has erred least so far is believed, as in JamaisVu and 3Sigma (Tumanov
  et al., EuroSys 2016; Park et al., EuroSys 2018, section 4.1). A group that has seen little is taken to err like the
  others of its level do. Recurrence by user, name and GPUs is what made this work on Alibaba's cluster (Weng et al.,
  NSDI 2022) and on Helios (Hu et al., SC 2021).
* What users ask for is an upper bound, and by how much they overstate it is a habit: some groups learn the ratio of run
  time to time limit. Both times vary over orders of magnitude, so all errors and quantiles are of logarithms.
* A job that has outlived part of its group's history is compared with the rest of it: the quantiles are those of run
  times above what it has attained (3Sigma, section 4.2). One that has outlived all is expected to need as long again,
  as is right for the heavy tails of these workloads (Harchol-Balter and Downey, SIGMETRICS 1996); Tsafrir et al. call
  the step prediction correction. Neither ever ends a job: only its time limit does.
* Predictions are rounded to two significant digits, so that identical jobs stay in one class of the queue.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields

WINDOW = 128
MOST_GROUPS = 200_000
LOW, HIGH = 0.1, 0.9
_SHORTEST_S = 1.0
_ERROR_HALF_LIFE = 16
"""Ends after which an error counts half."""
_FORGET = 0.5 ** (1 / _ERROR_HALF_LIFE)
_BORROWED_WEIGHT = 2.0
"""So many ends of its own weigh as much as what the level says of a group."""
_UNTRIED_ERROR = 1.5
"""Error of a level of which nothing is known: a factor of 4.5."""
_DEVIATION_TO_Z90 = 1.2816 * math.sqrt(math.pi / 2)
"""From the mean absolute error to the 90 % quantile, of a normal distribution."""
_EDITION_GROWTH = 1.1
_FEW = 10
"""With fewer run times than these the interval comes from past errors, not from quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is known of a job before it runs. `gpus` of the whole gang."""

    tenant: str
    gpus: int
    user: str | None = None
    name: str | None = None
    time_limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """A job's whole run time: the median, and the interval in which it ends in four cases of five."""

    predicted_s: float
    low_s: float
    high_s: float


@dataclass(slots=True)
class Calibration:
    """How good predictions were: the share of run times within the interval (0.8 is meant), the mean error as a power
    of e, and the pinball loss of the three quantiles (Koenker and Bassett, Econometrica 1978) in the same unit."""

    jobs: int = 0
    within: int = 0
    error: float = 0.0
    pinball: float = 0.0

    def record(self, said: Expectation, run_s: float) -> None:
        """A job that was expected to run so long ran so long."""
        ran = _log(run_s)
        self.jobs += 1
        # Predictions are rounded, so their bounds are a few per cent wide.
        self.within += said.low_s * 0.95 <= run_s <= said.high_s * 1.05
        self.error += abs(ran - _log(said.predicted_s))
        for share, quantile_s in ((LOW, said.low_s), (0.5, said.predicted_s), (HIGH, said.high_s)):
            above = ran - _log(quantile_s)
            self.pinball += max(share * above, (share - 1) * above) / 3

    def __add__(self, other: "Calibration") -> "Calibration":
        """The record of both."""
        return Calibration(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def document(self) -> dict[str, float]:
        """The figures, each per job."""
        sums = {"within_interval": self.within, "mean_log_error": self.error, "pinball_loss": self.pinball}
        return {"jobs": self.jobs, **{name: round(total / max(self.jobs, 1), 4) for name, total in sums.items()}}


class Predictor:
    """The history, as groups of run times."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, _Group] = {}
        self._levels: dict[str, _Error] = {}
        self.calibration = Calibration()
        self.edition = 0
        """Counts how often so much was learnt that it is worth the while to predict anew for all that wait."""
        self._ends = self._ends_of_edition = 0

    def observe(self, work: Work, run_s: float, said: Expectation | None = None) -> None:
        """A job ended after running so long. `said`: what had been expected of it, for the calibration."""
        if said is not None:
            self.calibration.record(said, run_s)
        self._ends += 1
        if self._ends >= self._ends_of_edition * _EDITION_GROWTH:
            self.edition += 1
            self._ends_of_edition = self._ends
        ran = _log(run_s)
        for level, key, base in _groups_of(work):
            group = self._groups.pop(key, None)
            if group is None:
                group = _Group(self._levels.setdefault(level, _Error(None)))
            self._groups[key] = group  # the one seen last comes last
            group.add(ran - base)
        while len(self._groups) > MOST_GROUPS:
            del self._groups[next(iter(self._groups))]

    def expect(self, work: Work, attained_s: float = 0.0) -> Expectation | None:
        """How long the job will have run in all, given that it has run so long. None: nothing is known at all."""
        least_error, best, its_base = math.inf, None, 0.0
        for _, key, base in _groups_of(work):
            group = self._groups.get(key)
            if group is not None and (error := group.error.mean()) < least_error:
                least_error, best, its_base = error, group, base
        limit_s = work.time_limit_s if work.time_limit_s is not None and work.time_limit_s > attained_s else None
        if best is None:
            return None if limit_s is None else Expectation(limit_s, attained_s, limit_s)
        return _expectation(best, its_base, least_error, attained_s=attained_s, limit_s=limit_s)


class _Error:
    """A mean that forgets, and begins with what the level above it says."""

    __slots__ = ("_level", "_sum", "_weight")

    def __init__(self, level: "_Error | None") -> None:
        self._level = level
        self._sum = self._weight = 0.0

    def add(self, error: float) -> None:
        self._sum = self._sum * _FORGET + error
        self._weight = self._weight * _FORGET + 1

    def mean(self) -> float:
        prior = _UNTRIED_ERROR if self._level is None else self._level.mean()
        return (self._sum + _BORROWED_WEIGHT * prior) / (self._weight + _BORROWED_WEIGHT)


class _Group:
    """The last run times of one group, as logarithms less the group's base, and how its predictions erred."""

    __slots__ = ("_level", "_recent", "error", "sorted")

    def __init__(self, level: _Error) -> None:
        self._recent: deque[float] = deque()
        self.sorted: list[float] = []
        self.error = _Error(level)
        self._level = level

    def add(self, value: float) -> None:
        if self.sorted:
            error = abs(value - self.quantile(0.5))
            self.error.add(error)
            self._level.add(error)
        self._recent.append(value)
        insort(self.sorted, value)
        if len(self._recent) > WINDOW:
            del self.sorted[bisect_left(self.sorted, self._recent.popleft())]

    def quantile(self, share: float, first: int = 0) -> float:
        """Of the values but for the first so many, of which there must be more; between two values in proportion."""
        values = self.sorted
        at = first + share * (len(values) - 1 - first)
        low = int(at)
        return values[low] if at == low else values[low] + (at - low) * (values[low + 1] - values[low])


def _groups_of(work: Work) -> Iterator[tuple[str, Hashable, float]]:
    """(level, group, base) from the most specific to the most general. Where a base is given the group learns the
    ratio to the time limit, or the GPU-seconds: what is known of a name tells also when it comes with other GPUs."""
    tenant, user, name, gpus, limit_s = work.tenant, work.user, work.name, work.gpus, work.time_limit_s
    if user is not None or name is not None:
        yield "kind", (tenant, user, name, gpus, limit_s), 0.0
        yield "kind at any limit", (tenant, user, name, gpus), 0.0
        yield "user and gpus", (tenant, user, gpus), 0.0
        yield "user", (tenant, user), 0.0
    if name is not None:
        yield "name", ("name", tenant, name), 0.0
        yield "name's work", ("work", tenant, name), -_log(gpus)
    yield "tenant and gpus", (tenant, gpus), 0.0
    yield "tenant", (tenant,), 0.0
    yield "all", (), 0.0
    if limit_s is not None:
        base = _log(limit_s)
        yield "user's ratio", ("ratio", tenant, user), base
        yield "ratio", ("ratio",), base
        yield "ratio at this limit", ("ratio", limit_s), base


def _expectation(group: _Group, base: float, error: float, *, attained_s: float, limit_s: float | None) -> Expectation:
    attained = _log(attained_s) - base if attained_s > 0 else -math.inf
    first = bisect_right(group.sorted, attained)
    left = len(group.sorted) - first
    if left == 0:
        return _bounded(2 * attained_s, low_s=attained_s, high_s=4 * attained_s, limit_s=limit_s)
    middle = group.quantile(0.5, first)
    if left < _FEW:
        low, high = middle - _DEVIATION_TO_Z90 * error, middle + _DEVIATION_TO_Z90 * error
    else:
        low, high = group.quantile(LOW, first), group.quantile(HIGH, first)
    low_s, high_s = math.exp(max(low, attained) + base), math.exp(high + base)
    return _bounded(math.exp(middle + base), low_s=low_s, high_s=high_s, limit_s=limit_s)


def _bounded(predicted_s: float, *, low_s: float, high_s: float, limit_s: float | None) -> Expectation:
    predicted_s, low_s, high_s = rounded(predicted_s), rounded(low_s), rounded(high_s)
    if limit_s is None:
        return Expectation(predicted_s, low_s, high_s)
    return Expectation(min(predicted_s, limit_s), min(low_s, limit_s), min(high_s, limit_s))


def rounded(seconds: float) -> float:
    """To two significant digits."""
    return float(f"{seconds:.1e}")


def _log(amount: float) -> float:
    return math.log(max(amount, _SHORTEST_S))
