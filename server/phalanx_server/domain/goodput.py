"""Goodput: the share of the GPU time that a job was given in which it took steps that count, and where the rest went.

Owns the split. Pure: what is known of the attempts comes in. The term and its parts: Google Cloud, "Introducing ML
productivity goodput" (2024). Time in the queue is no part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

PARTS = (
    "productive",
    "start",
    "rendezvous",
    "setup",
    "data_wait",
    "checkpoint",
    "rolled_back",
    "redone",
    "stopping",
    "other",
)
"""In which an attempt's time falls: steps that count; from its GPUs being taken until all ranks run; until their
process group is up; until the first step is done; waiting for data; standing still for a checkpoint; steps that the
training itself took back; steps after the checkpoint that a later attempt began from; from the request to stop to the
end; and what none of these explains, such as communication outside of steps, evaluation, or work after the last
step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptTime:
    """What is known of one attempt. Moments are None until they are reached; totals and steps until they are reported.
    `weight`: its GPUs, or its replicas where it has none. `first_step` of a training is the lowest: lower than the one
    it began with where it went back to a checkpoint of an earlier attempt; of what does not say that it is one, the
    first in time, and `last_step` the highest."""

    weight: int
    created_at: datetime
    started_at: datetime | None = None
    rendezvous_at: datetime | None = None
    first_step_at: datetime | None = None
    stop_requested_at: datetime | None = None
    ended_at: datetime | None = None
    first_step: int | None = None
    last_step: int | None = None
    last_step_at: datetime | None = None
    productive_s: float | None = None
    data_wait_s: float = 0.0
    checkpoint_s: float = 0.0
    rolled_back_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Goodput:
    """Seconds × GPUs by part. `is_measured`: every attempt that trained said itself how long it took productive steps;
    else the time from its first step to its last, without what is known to be lost, is taken for that."""

    parts: dict[str, float]
    is_measured: bool

    @property
    def allocated(self) -> float:
        return sum(self.parts.values())

    @property
    def share(self) -> float | None:
        """The goodput; None before anything was allocated."""
        return self.parts["productive"] / self.allocated if self.allocated > 0 else None


def goodput_of(attempts: Sequence[AttemptTime], now: datetime) -> Goodput:
    """Of a job's attempts in their order; one that has not ended is counted until now."""
    total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    again_from: int | None = None  # the lowest step that any later attempt took
    for attempt in reversed(attempts):
        for part, seconds in _split(attempt, again_from, now).items():
            total[part] += attempt.weight * seconds
        if attempt.first_step is not None:
            again_from = attempt.first_step if again_from is None else min(again_from, attempt.first_step)
    trained = [attempt for attempt in attempts if attempt.first_step_at is not None]
    return Goodput(total, all(attempt.productive_s is not None for attempt in trained))


def _split(attempt: AttemptTime, again_from: int | None, now: datetime) -> dict[str, float]:
    """The attempt's seconds by part; they add up to its whole time. Steps from `again_from` on were taken again."""
    end = max(attempt.ended_at or now, attempt.created_at)
    moments = [attempt.created_at]
    for moment in (attempt.started_at, attempt.rendezvous_at or attempt.first_step_at, attempt.first_step_at):
        moments.append(min(max(moment or end, moments[-1]), end))
    stop = max(min(attempt.stop_requested_at or end, end), moments[-1])
    start, rendezvous, setup = ((later - earlier).total_seconds() for earlier, later in pairwise(moments))
    parts = {"start": start, "rendezvous": rendezvous, "setup": setup, "stopping": (end - stop).total_seconds()}
    stepped = min(max(attempt.last_step_at or stop, moments[-1]), stop)
    said_s = (stepped - moments[-1]).total_seconds()
    return parts | _trained(attempt, again_from, (stop - moments[-1]).total_seconds(), said_s)


def _trained(attempt: AttemptTime, again_from: int | None, left_s: float, said_s: float) -> dict[str, float]:
    """Of the time from the first step on, `left_s` seconds, `said_s` of them until the last step that it reported. What
    ranks count by their own clocks is cut to fit."""
    parts: dict[str, float] = {}
    known = {
        "data_wait": attempt.data_wait_s,
        "checkpoint": attempt.checkpoint_s,
        "rolled_back": attempt.rolled_back_s,
        "productive": said_s if attempt.productive_s is None else attempt.productive_s,
    }
    for part, seconds in known.items():
        parts[part] = min(max(seconds, 0.0), left_s)
        left_s -= parts[part]
    parts["redone"] = parts["productive"] * _redone_share(attempt, again_from)
    parts["productive"] -= parts["redone"]
    return parts | {"other": left_s}


def _redone_share(attempt: AttemptTime, again_from: int | None) -> float:
    """The share of the attempt's steps that a later one took again."""
    if again_from is None or attempt.first_step is None or attempt.last_step is None:
        return 0.0
    steps = attempt.last_step - attempt.first_step + 1
    again = attempt.last_step - again_from + 1
    return min(max(again / steps, 0.0), 1.0) if steps > 0 else 0.0
