"""Owns how fast an elastic job runs at each number of replicas: as measured, else by a prior.

Refuses to know who measures. `progress` is relative to one replica.
"""

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


def _prior(replicas: int) -> float:
    return float(replicas * (1 - LOST_PER_DOUBLING) ** log2(replicas))
