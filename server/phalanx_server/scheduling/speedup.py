"""Owns how fast an elastic job runs at each number of replicas: as measured, else by a prior.

Refuses to know who measures. `progress` and `speedup` are relative to one replica.
"""

from collections.abc import Mapping
from math import log2

from phalanx_server.scheduling.snapshot import Job

LOST_PER_DOUBLING = 0.1
"""The prior: each doubling of the replicas loses so much of what it could gain at most. That is the order of well-tuned
data-parallel training on a few nodes; Pollux (OSDI'21, fig. 1a) shows both better and worse."""


def progress(job: Job, replicas: int) -> float:
    """Progress per second at so many replicas, where one replica has 1.0: measured, or between two that were measured
    on a straight line, or beyond them by the prior."""
    if not job.speedup:
        return _prior(replicas)
    known = {int(n): s for n, s in job.speedup.items()} | {1: job.speedup.get("1", 1.0)}
    if replicas in known:
        return max(known[replicas], 1e-9)
    below = max((n for n in known if n < replicas), default=None)
    above = min((n for n in known if n > replicas), default=None)
    if below is None or above is None:
        nearest = below if below is not None else above
        assert nearest is not None, "one replica is always known"
        return max(known[nearest], 1e-9) * _prior(replicas) / _prior(nearest)
    part = (replicas - below) / (above - below)
    return max(known[below] + part * (known[above] - known[below]), 1e-9)


def speedup_of(measured: Mapping[int, float]) -> dict[str, float] | None:
    """A job's `speedup` from its progress per second by number of replicas, in any unit. Where one replica was never
    run, the smallest number that was is taken to be as far from it as the prior says. None for less than two numbers:
    there is nothing to compare, and the prior says as much."""
    if len(measured) < 2:
        return None
    least = min(measured)
    one = measured[least] / _prior(least)
    return {str(replicas): round(speed / one, 4) for replicas, speed in sorted(measured.items())}


def _prior(replicas: int) -> float:
    return float(replicas * (1 - LOST_PER_DOUBLING) ** log2(replicas))
