"""Owns how fast an elastic job runs at each number of replicas, as measured, else by a prior; and what more would gain.

Refuses to know who measures. `progress` and `speedup` are relative to one replica.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import inf, log, log2

from phalanx_server.scheduling.snapshot import Job

LOST_PER_DOUBLING = 0.1
"""The prior: each doubling of the replicas loses so much of what it could gain at most. That is the order of well-tuned
data-parallel training on a few nodes; Pollux (OSDI'21, fig. 1a) shows both better and worse."""

PLAUSIBLE = (1e-3, 2.0)
"""A measured job gains at least so little, and at most so many times its replicas: what jobs report of themselves must
not outweigh everybody else's, nor end a pass."""

_LEAST, _MOST = 1e-9, 1e9
_Speeds = tuple[tuple[int, float], ...]
"""Measured, by number of replicas; () = not measured."""


def progress(job: Job, replicas: int) -> float:
    """Progress per second at so many replicas, where one replica has 1.0: measured, or between two that were measured
    on a straight line, or beyond them by the prior."""
    return _progress(_speeds(job), replicas)


def best_gain(job: Job, replicas: int, most: int, step: int) -> tuple[float, int]:
    """The largest `relative_gain` for each replica more, and with how many replicas the job would have it. It sees past
    a size that is no faster: what loses with 6 and gains with 12 is asked about 12. (0.0, replicas) = none gains."""
    return _best_gain(_speeds(job), replicas, most, step)


def relative_gain(job: Job, fewer: int, more: int) -> float:
    """By how much faster it is with more, as a logarithm: twice as fast counts alike for all."""
    speeds = _speeds(job)
    return log(_progress(speeds, more) / _progress(speeds, fewer))


def _speeds(job: Job) -> _Speeds:
    return tuple(sorted((int(n), s) for n, s in job.speedup.items())) if job.speedup else ()


@lru_cache(maxsize=65_536)
def _progress(speeds: _Speeds, replicas: int) -> float:
    if not speeds:
        return _prior(replicas)
    known = {1: 1.0} | dict(speeds)
    if replicas in known:
        return _bounded(known[replicas])
    below = max((n for n in known if n < replicas), default=None)
    above = min((n for n in known if n > replicas), default=None)
    if below is None or above is None:
        nearest = below if below is not None else above
        assert nearest is not None, "one replica is always known"
        return _bounded(_bounded(known[nearest]) * _prior(replicas) / _prior(nearest))
    part = (replicas - below) / (above - below)
    slower, faster = _bounded(known[below]), _bounded(known[above])
    return slower + part * (faster - slower)


def _bounded(speed: float) -> float:
    return min(max(speed, _LEAST), _MOST)


def speedup_of(measured: Mapping[int, float]) -> dict[str, float] | None:
    """A job's `speedup` from its progress per second by number of replicas, in any unit. Where one replica was never
    run, the smallest number that was is taken to be as far from it as the prior says. None for less than two numbers:
    there is nothing to compare, and the prior says as much. Bounded to what is `PLAUSIBLE`."""
    known = {replicas: speed for replicas, speed in measured.items() if 0 < speed < inf}
    if len(known) < 2:
        return None
    least = min(known)
    said = {n: speed / known[least] * _prior(least) for n, speed in sorted(known.items())}
    lowest, for_each = PLAUSIBLE
    return {str(n): round(min(max(speedup, lowest), for_each * n), 4) for n, speedup in said.items()}


def _prior(replicas: int) -> float:
    return float(replicas * (1 - LOST_PER_DOUBLING) ** log2(replicas))


@lru_cache(maxsize=65_536)
def _best_gain(speeds: _Speeds, replicas: int, most: int, step: int) -> tuple[float, int]:
    now = _progress(speeds, replicas)
    told = {replicas + step, 2 * replicas, most, *(n for n, _ in speeds)}
    sizes = {n - (n - replicas) % step for n in told if replicas + step <= n <= most}
    gains = [(log(_progress(speeds, n) / now) / (n - replicas), -n) for n in sizes]
    gain, size = max(gains, default=(0.0, -replicas))
    return (gain, -size) if gain > 0 else (0.0, replicas)
