"""What looks on while a model trains: the meter of its time, the watch over its health, and the report of both.

Owns what is reported and when: the step's loss and the times of all steps since the last report as often as is wanted,
but five times a second at most; the comparison of the ranks and the running totals every other second, and with each
checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import phalanx
import torch
import torch.distributed as dist
from phalanx.recipes.config import Train
from phalanx.recipes.health import VARIABLE, Health
from phalanx.recipes.parse import parse

from phalanx_worker.training.health.recompute import Again, Pulse
from phalanx_worker.training.health.watch import Watch
from phalanx_worker.training.mesh import World
from phalanx_worker.training.metrics.meter import Meter
from phalanx_worker.training.metrics.work import Work, peak_flops
from phalanx_worker.training.parallel.layout import Layout

if TYPE_CHECKING:
    from phalanx_worker.training.loop import Facts  # the loop imports this module

REPORT_GAP_S = 0.2  # a report costs a tenth of a millisecond, and nobody looks at more
NOT_OURS = ("hang", "gpu", "preflight")  # sections of the job file's `health` that are the node's business


def health_of_job() -> Health:
    """What the job file says, or the defaults."""
    given = json.loads(os.environ.get(VARIABLE) or "{}")
    return parse(Health, {name: section for name, section in given.items() if name not in NOT_OURS})


class Monitor:
    """Enter it around a training; the loop calls the rest at the places that their names say, in every step, on every
    rank. `per_step` is what a step consumes ({"tokens": 65536}), `work` counts the model, `precision` is what it
    computes in; `can_return`: there is a checkpointer."""

    def __init__(
        self,
        layout: Layout,
        train: Train,
        *,
        precision: str,
        per_step: Mapping[str, int],
        work: Callable[[], Work] | None,
        can_return: bool,
    ) -> None:
        health, world = health_of_job(), layout.world
        every = world.parallel.local.every
        self._is_first = dist.get_rank() == 0
        self.meter = Meter(world.device, longest_window=health.straggler.window, tells=self._is_first)
        self.watch = Watch(
            health,
            device=world.device,
            modules=layout.modules,
            replicas=world.group("replicas"),
            meets=lambda step: not every or step % every == 0,
            alike=_stages(world),
            can_return=can_return,
            repeatable=world.parallel.compress != "powersgd",  # it remembers what it left out
        )
        self._layout, self._train, self._precision = layout, train, precision
        self._per_step, self._count_work = per_step, work
        self._work: Work | None = None
        self._news = False
        self._reported_at = 0.0

    def __enter__(self) -> Monitor:
        self.meter.waits.__enter__()
        for module in self._layout.modules:
            self.meter.waits.watch(module)
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.waits.__exit__()

    def before_step(self, step: int) -> None:
        spread = self.meter.before_step()
        if spread is not None:
            self._news = True
            self.watch.take(spread, step - 1)

    def before_forward(self) -> None:
        self.watch.before_forward()

    def after_backward(self, pulse: Pulse, again: Again) -> tuple[Pulse, bool]:
        """The pulse to go on with, and whether to apply the update."""
        return self.watch.after_backward(pulse, again)

    def after_step(self, facts: Facts, *, keeps: bool) -> int | None:
        """The step before which training is to go back to a checkpoint, if so; `keeps`: one is made of this step."""
        self.meter.after_step(facts)
        before = self.watch.after_step(facts.step, facts.loss, keeps=keeps)
        if self._is_first and (keeps or self._is_wanted(facts.step)):
            self._report(facts, in_full=self._news or keeps)
        return before

    def state(self) -> Watch:
        return self.watch

    def keep_before(self, step: int) -> int | None:
        return self.watch.keep_before(step)

    def after_keep(self, step: int, stall_s: float) -> None:
        self.meter.after_keep(step, stall_s)

    def finished(self, step: int, waited_s: float) -> None:
        """The last step's checkpoint is complete, which took so long after all else."""
        self.meter.after_keep(step, waited_s)
        if self._is_first:
            phalanx.report(step=step, total_steps=self._train.steps, **self._totals(step))

    def returned(self, step: int | None) -> None:
        """Training was rolled back to this step; None: no checkpoint is old enough. Raises Unhealthy then."""
        self.watch.returned(step)
        if step is not None:
            self.meter.totals.went_back(step)

    def _is_wanted(self, step: int) -> bool:
        now = time.perf_counter()
        has_reported = self._reported_at > 0  # by the first report the end of the setup is known
        if has_reported and (step % self._train.report_every or now < self._reported_at + REPORT_GAP_S):
            return False
        self._reported_at = now
        return True

    def _report(self, facts: Facts, *, in_full: bool) -> None:
        times, checkpoint_s, other_s = self.meter.since_told()
        values = {
            "loss": facts.loss,
            "grad_norm": facts.grad_norm,
            "lr": facts.lr,
            "step_time_s": times.step_time_s,
            "data_wait_s": times.data_wait_s,
            "compute_s": times.compute_s,
            "comm_s": times.comm_s,
            "checkpoint_s": checkpoint_s,
            "other_s": other_s,
            **{f"{what}_per_s": amount / times.step_time_s for what, amount in self._per_step.items()},
        }
        if in_full:
            values |= self._comparison() | self._totals(facts.step)
            self._news = False
        if self._work is not None:
            values |= self._mfu(times.step_time_s)
        phalanx.report(step=facts.step, total_steps=self._train.steps, **values)

    def _comparison(self) -> dict[str, float]:
        """Of the ranks; and, the first time, the size of the model."""
        told = self.meter.spread.metrics() if self.meter.spread else {}
        if self._work is None and self._count_work is not None:
            self._work = self._count_work()
            told["parameters"] = self._work.parameters
        return told

    def _totals(self, step: int) -> dict[str, float]:
        totals = self.meter.totals
        return {
            "productive_s": totals.productive_s,
            "lost_s": totals.lost_s,
            "data_wait_total_s": totals.data_wait_s,
            "checkpoint_total_s": totals.checkpoint_s,
            **{f"{what}_total": float(step * amount) for what, amount in self._per_step.items()},
        }

    def _mfu(self, step_time_s: float) -> dict[str, float]:
        assert self._work is not None
        device: torch.device = self._layout.world.device
        peak = peak_flops(device, self._precision)
        if peak is None:
            return {}
        return {"mfu": self._work.flops / (step_time_s * dist.get_world_size() * peak)}


def _stages(world: World) -> list[list[int]] | None:
    """The ranks of each place along the pipeline; None where there is none."""
    if world.mesh is None or world.group("pipeline") is None:
        return None
    along = (world.mesh.mesh_dim_names or ()).index("pipeline")
    by_stage = world.mesh.mesh.movedim(along, 0)
    return by_stage.reshape(len(by_stage), -1).tolist()
