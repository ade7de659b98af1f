"""How fast a job is with so many replicas: progress per second of its steady running, from what it reports.

Owns what counts as progress, how readings are added up, and when a figure is worth telling. Refuses to know where
readings come from, and what becomes of the figures.

* Progress is tokens where the job reports `tokens_per_s`, else samples (`samples_per_s`, or `global_batch` times
  steps), else steps. Each is of the whole job, not of a rank. Where the global batch grows with the replicas, steps
  alone would show no gain. That a larger batch may teach less is not counted. A reading without what the attempt has
  reported before is passed over, with its time: only another attempt takes to less.
* A few seconds are no figure: it takes `STEADY_S` of running and `COUNT_MIN` steps (or readings, where steps are not
  reported). One that was told stays until it is off by `CHANGE`, so that passes are not told noise.
* What was long ago fades: `KEEP_S` of running weigh as much as all before them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite

SETTLE_S = 15.0
"""Caches fill and kernels are compiled: nothing counts until so long after the first step, or the start."""
STEADY_S = 60.0
COUNT_MIN = 10
CHANGE = 0.05
KEEP_S = 3600.0

_RATES = ("tokens_per_s", "samples_per_s")
_STEPS = "steps_per_s"
_RANKED = (*_RATES, _STEPS)
_BATCH = "global_batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What an attempt had reported at a moment: its highest step, and the latest value of each name."""

    attempt: str
    at_s: float
    step: int | None
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of one number of replicas: so much `work`, in what `unit` says, in `seconds` of steady running, in
    which `counted` steps were made; the last reading; and the progress per second that was told, None = none yet."""

    unit: str
    attempt: str
    at_s: float
    step: int | None
    work: float = 0.0
    seconds: float = 0.0
    counted: int = 0
    speed: float | None = None


def measure(before: Measured | None, now: Reading) -> Measured | None:
    """What is known after one more reading. The first of an attempt is only where counting begins. None: the job
    reports nothing that is progress."""
    unit = _unit_of(now)
    if unit is None:
        return before
    if before is None or (before.unit != unit and not _is_gap(before, now, unit)):
        return Measured(unit=unit, attempt=now.attempt, at_s=now.at_s, step=now.step)
    seconds = now.at_s - before.at_s
    if before.attempt != now.attempt:
        return replace(before, attempt=now.attempt, at_s=now.at_s, step=now.step)
    if seconds <= 0:
        return before
    if before.unit != unit:
        return replace(before, at_s=now.at_s, step=before.step if now.step is None else now.step)
    steps = max(0, now.step - before.step) if now.step is not None and before.step is not None else None
    total = replace(
        before,
        at_s=now.at_s,
        step=before.step if now.step is None else now.step,
        work=before.work + _work(unit, now, seconds, steps or 0),
        seconds=before.seconds + seconds,
        counted=before.counted + (1 if steps is None else steps),
    )
    return _told(_faded(total))


def _is_gap(before: Measured, now: Reading, unit: str) -> bool:
    """An attempt that has said something better says it again."""
    return before.attempt == now.attempt and _RANKED.index(unit) > _RANKED.index(before.unit)


def _unit_of(now: Reading) -> str | None:
    for rate in _RATES:
        if _is_positive(now.values.get(rate)):
            return rate
    if now.step is None:
        return None
    return _RATES[1] if _is_positive(now.values.get(_BATCH)) else _STEPS


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value) and value > 0


def _work(unit: str, now: Reading, seconds: float, steps: int) -> float:
    if unit == _STEPS:
        return float(steps)
    rate = now.values.get(unit)
    return rate * seconds if _is_positive(rate) and rate is not None else steps * now.values[_BATCH]


def _faded(total: Measured) -> Measured:
    if total.seconds <= KEEP_S:
        return total
    part = KEEP_S / total.seconds
    return replace(total, work=total.work * part, seconds=KEEP_S)


def _told(total: Measured) -> Measured:
    if total.seconds < STEADY_S or total.counted < COUNT_MIN or total.work <= 0:
        return total
    speed = total.work / total.seconds
    if total.speed is not None and abs(speed / total.speed - 1) <= CHANGE:
        return total
    return replace(total, speed=float(f"{speed:.4g}"))
