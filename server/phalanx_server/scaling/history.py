"""Past runs of the service as runs of the fit. It owns which metrics are read and how a series becomes one number; it
refuses to send anything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from phalanx.models import Job, Point, Series

from phalanx_server.scaling.runs import LeftOut, Run, make_run

TAIL = 0.02
"""The final loss is the mean over so large a share of the steps, at the end: one batch alone is noisy."""


@dataclass(frozen=True)
class Names:
    """How a job calls its metrics. `tokens` counts all tokens seen so far, by all ranks."""

    loss: str = "loss"
    tokens: str = "tokens_total"
    parameters: str = "parameters"
    tokens_per_s: str = "tokens_per_s"

    @property
    def all(self) -> tuple[str, ...]:
        return (self.loss, self.tokens, self.parameters, self.tokens_per_s)


def why_not(job: Job) -> str | None:
    """Why a job cannot tell what its size and tokens came to, whatever it reported."""
    if job.state == "succeeded":
        return None
    return f"it {job.state}" if job.state == "failed" else f"it is {job.state}: only runs that succeeded count"


def run_of(job: Job, series: Sequence[Series], names: Names, *, tail: float = TAIL) -> Run | LeftOut:
    """A job with what it reported."""
    name = f"{job.name} {job.id}"
    reason = why_not(job)
    if reason:
        return LeftOut(name, reason)
    points = {one.name: one.points for one in series}
    absent = [metric for metric in names.all[:3] if not points.get(metric)]
    if absent:
        return LeftOut(name, f"it did not report {' and '.join(absent)}")
    return make_run(name, _values(job, points, names, tail))


def _values(job: Job, points: Mapping[str, list[Point]], names: Names, tail: float) -> dict[str, Any]:
    return {
        "loss": _final(points[names.loss], tail),
        "tokens": _most(points[names.tokens]),
        "parameters": _most(points[names.parameters]),
        "tokens_per_s": _usual(points.get(names.tokens_per_s, [])),
        "gpus": job.gpus,
        "gpu_type": (job.attempt.gpu_type if job.attempt else None) or "",
    }


def _final(points: Sequence[Point], tail: float) -> float:
    """The mean of the last steps; NaN where one of them was not finite."""
    last = max((point.step or 0 for point in points), default=0)
    ends = [point for point in points if (point.step or 0) >= (1 - tail) * last] if last else points[-1:]
    return float(np.average([_finite(point.mean) for point in ends], weights=[max(1, point.count) for point in ends]))


def _most(points: Sequence[Point]) -> float:
    return max((value for point in points if math.isfinite(value := _finite(point.max))), default=math.nan)


def _usual(points: Sequence[Point]) -> float:
    """The median: starts and pauses do not count."""
    values = [value for point in points if math.isfinite(value := _finite(point.mean))]
    return float(np.median(values)) if values else 0.0


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
