"""Splits the time of every step, and now and then compares the ranks.

Owns the window of steps that is averaged, and when it ends: after about two seconds, at the same step on every rank.
What is told, and where, is the monitor's.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from phalanx_worker.training.metrics.spread import Spread, Times, gather
from phalanx_worker.training.metrics.totals import Totals
from phalanx_worker.training.metrics.waits import Waits

WINDOW_S = 2.0  # how much training one comparison covers, as far as the steps' lengths allow


class StepTimes(Protocol):
    """Of a step that is over, without what came after it."""

    @property
    def step(self) -> int: ...
    @property
    def step_time_s(self) -> float: ...
    @property
    def data_wait_s(self) -> float: ...
    @property
    def updated(self) -> bool: ...


@dataclass
class _Step:
    """One step from its beginning to the next one's."""

    step_s: float
    data_wait_s: float
    waited: Callable[[], float]
    checkpoint_s: float = 0.0
    whole_s: float = 0.0

    @cached_property
    def comm_s(self) -> float:
        return self.waited()

    @property
    def compute_s(self) -> float:
        return max(0.0, self.step_s - self.data_wait_s - self.comm_s)

    @property
    def other_s(self) -> float:
        """Between the step and the next one, without checkpoints: evaluations, and what looks on."""
        return max(0.0, self.whole_s - self.step_s - self.checkpoint_s)

    def times(self) -> Times:
        return Times(
            step_time_s=self.whole_s,
            compute_s=self.compute_s,
            comm_s=self.comm_s,
            data_wait_s=self.data_wait_s,
            checkpoint_s=self.checkpoint_s,
            other_s=self.other_s,
        )


class Meter:
    """Call `before_step`, `after_step` and, where a checkpoint was made, `after_keep`, in this order in every step.

    `spread` is the split of all ranks' steps over the last window; None before there is one. Steps are split when that
    is asked for, not each by itself: it would cost more than all the rest. `tells`: somebody asks what came
    `since_told`.
    """

    def __init__(self, device: torch.device, *, longest_window: int, tells: bool = True) -> None:
        self.waits = Waits(device)
        self.totals = Totals()
        self.spread: Spread | None = None
        self._device, self._longest, self._tells = device, longest_window, tells
        self._began = 0.0
        self._step: _Step | None = None
        self._is_first = True
        self._between = (0.0, 0.0)
        self._untold: list[_Step] = []
        self._sums, self._count = Times(), 0  # of those untold that are no longer in the list
        self._window: list[_Step] = []
        self._due = 1  # steps until ranks are compared

    def before_step(self) -> Spread | None:
        """A step begins, and so the one before it is over. Gives everyone's times where a window has ended."""
        now = time.perf_counter()
        if self._step is not None:
            self._step.whole_s = now - self._began
            self._window.append(self._step)
            self._is_first = False
            checkpoint_s, other_s = self._between
            self._between = (checkpoint_s + self._step.checkpoint_s, other_s + self._step.other_s)
        self._began, self._step = now, None
        spread = self._compare() if len(self._window) >= self._due else None
        self.waits.took()  # for what came between steps, an evaluation or this comparison, no step has waited
        return spread

    def after_step(self, facts: StepTimes) -> None:
        """Its update is done, or was refused."""
        self._step = _Step(facts.step_time_s, facts.data_wait_s, self.waits.took())
        if self._tells:
            self._untold.append(self._step)
        if not self._is_first:
            work_s = facts.step_time_s - facts.data_wait_s
            self.totals.step(work_s=work_s, data_wait_s=facts.data_wait_s, counts=facts.updated)

    def split(self) -> Times:
        """Of the step that `after_step` was told of last, as far as it has come; for who looks at every single one."""
        return self._step.times() if self._step is not None else Times()

    def since_told(self) -> tuple[Times, float, float]:
        """Since this was asked last, at least one step ago: means per step, of the steps alone; and how long
        checkpoints, and other things, took between them in all."""
        self._add_up()
        means = Times(*(total / self._count for total in vars(self._sums).values()))
        between, self._between = self._between, (0.0, 0.0)
        self._sums, self._count = Times(), 0
        return means, *between

    def _add_up(self) -> None:
        """What is untold: a step that is read no longer needs its events."""
        for step in self._untold:
            own = Times(step.step_s, step.compute_s, step.comm_s, step.data_wait_s)
            self._sums = Times(*(map(operator.add, vars(self._sums).values(), vars(own).values())))
        self._count += len(self._untold)
        self._untold = []

    def after_keep(self, step: int, stall_s: float) -> None:
        """A checkpoint was made and held training up for so long."""
        self.totals.kept(step, stall_s)
        if self._step is not None:
            self._step.checkpoint_s += stall_s

    def _compare(self) -> Spread:
        own = replace(_mean([step.times() for step in self._window]), **_gpu(self._device))
        self.spread = gather(own, steps=len(self._window), device=self._device)
        self._window = []
        self._add_up()
        wanted = WINDOW_S / max(self.spread.step_time_s, 1e-6)
        self._due = max(1, min(self._longest, round(wanted)))
        return self.spread


def _mean(window: list[Times]) -> Times:
    count = len(window)
    return Times(*(sum(column) / count for column in zip(*(vars(times).values() for times in window), strict=True)))


def _gpu(device: torch.device) -> dict[str, float]:
    """Of this rank's GPU, where it has one: the share of time that it was busy, and the most memory that was taken."""
    if device.type != "cuda":
        return {}
    told: dict[str, float] = {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(device))}
    with suppress(Exception):  # no NVML here, or it does not tell (of a part of a GPU): NVMLError is of no other kind
        told["gpu_utilization"] = torch.cuda.utilization(device) / 100
    return told
