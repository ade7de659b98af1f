"""The training loop: next batch, forward and backward, clip, update, report, keep, until done or asked to stop.

Owns the order of these. What a step computes is the layout's business, what is stored the checkpointer's, and what is
made of the numbers the watchers'.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import phalanx
import torch
import torch.distributed as dist
from phalanx.recipes.lm import Train
from phalanx.recipes.optim import Optim
from phalanx.recipes.precision import Precision
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from phalanx_worker.training.optim import clip, divide, global_norm, make_optimizer, set_rate
from phalanx_worker.training.parallel.layout import Layout
from phalanx_worker.training.precision import LossScale
from phalanx_worker.training.state import ModelState, OptimizerState

Batch = Mapping[str, Tensor]


class Checkpointer(Protocol):
    """Keeps the training state; every rank calls each method at the same step."""

    def save(self, step: int, state: Mapping[str, Stateful], /, *, metrics: Mapping[str, float]) -> object: ...

    def restore(self, state: Mapping[str, Stateful], /) -> int | None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class Facts:
    """What is known of a step, on every rank. `loss` is the global batch's mean and `grad_norm` the global norm before
    clipping; `updated` is False where fp16 gradients overflowed or a watcher refused, and the step
    was skipped."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    updated: bool
    step_time_s: float
    data_wait_s: float


class Watcher(Protocol):
    """Looks on. `after_backward` may refuse the update (skip this batch): it sees what all ranks see (`grad_norm` is a
    scalar on the device, so that only who reads it waits for it), and all have to answer alike."""

    def after_backward(self, step: int, loss: float, grad_norm: Tensor) -> bool: ...

    def after_step(self, facts: Facts) -> None: ...


@dataclass
class Trainer:
    """A model in its layout together with all that a step needs and a checkpoint keeps."""

    layout: Layout
    batches: Iterator[Batch]
    train: Train
    optim: Optim
    precision: Precision
    watchers: Sequence[Watcher] = ()
    checkpointer: Checkpointer | None = None
    checkpoint_every: int = 0  # steps; 0: at the end and when asked to stop
    per_step: Mapping[str, int] = field(default_factory=dict)  # what a step consumes, to report: {"tokens": 65536}

    def __post_init__(self) -> None:
        self.optimizers = [make_optimizer(self.optim, module) for module in self.layout.modules]
        self.scale = LossScale(self.precision)

    def state(self) -> dict[str, Stateful]:
        """All that a checkpoint has to hold, by name."""
        parts = {
            "model": ModelState(self.layout.modules),
            "optimizer": OptimizerState(self.layout.modules, self.optimizers),
            "loss_scale": self.scale,
            "outer": self.layout.outer,
            "stream": self.batches if hasattr(self.batches, "state_dict") else None,
        }
        return {name: part for name, part in parts.items() if part is not None}  # pyright: ignore[reportReturnType]


def train(trainer: Trainer) -> Facts | None:
    """Train from the last checkpoint, or from the start, to the last step. Gives the last step's facts, or None where
    nothing was left to do."""
    done, facts = _resume(trainer), None
    for step in range(done + 1, trainer.train.steps + 1):
        facts, stop = _step(trainer, step)
        for watcher in trainer.watchers:
            watcher.after_step(facts)
        if step % trainer.train.report_every == 0 or step == trainer.train.steps:
            _report(trainer, facts)
        if stop or step == trainer.train.steps or _is_due(step, trainer.checkpoint_every):
            _keep(trainer, facts)
        if stop:
            break
    if trainer.checkpointer:
        trainer.checkpointer.finish()
    return facts


def _step(trainer: Trainer, step: int) -> tuple[Facts, bool]:
    """One step; and whether any rank was asked to stop."""
    began = time.perf_counter()
    batch = next(trainer.batches)
    waited = time.perf_counter() - began
    layout, scale = trainer.layout, trainer.scale.scale
    rate = trainer.optim.lr * trainer.optim.schedule.factor(step, steps=trainer.train.steps)
    set_rate(trainer.optimizers, rate)

    own_loss = layout.run(batch, loss_scale=scale)
    norm = global_norm(layout.parameters(), layout.world.group("pipeline")) / scale
    loss, stop = _agree(own_loss, phalanx.should_stop(), layout.world.device)
    answers = [watcher.after_backward(step, loss, norm) for watcher in trainer.watchers]  # all are asked
    updated = _update(trainer, norm=norm, scale=scale, wanted=all(answers))
    if layout.outer:
        layout.outer.after(step)
    took = time.perf_counter() - began
    return Facts(step, loss, float(norm), rate, updated, step_time_s=took, data_wait_s=waited), stop


def _update(trainer: Trainer, *, norm: Tensor, scale: float, wanted: bool) -> bool:
    """Clip and update, unless the gradients overflowed or it is not wanted; gradients are gone afterwards."""
    ok = trainer.scale.accept(norm) and wanted
    if ok:
        parameters = list(trainer.layout.parameters())
        if scale != 1.0:
            divide(parameters, scale)
        if trainer.optim.clip:
            clip(parameters, norm=norm, limit=trainer.optim.clip)
        for optimizer in trainer.optimizers:
            optimizer.step()
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return ok


def _agree(own_loss: Tensor | None, stop: bool, device: torch.device) -> tuple[float, bool]:
    """The mean over those ranks that have a loss, and whether any rank wants to stop: all leave at the same step."""
    has = own_loss is not None
    mine = torch.tensor([0.0, has, stop], device=device)
    if has:
        mine[0] = own_loss
    dist.all_reduce(mine)
    total, count, stops = mine.tolist()
    return total / count, stops > 0


def _resume(trainer: Trainer) -> int:
    """The step that the restored state is of; 0 for a fresh start."""
    return (trainer.checkpointer.restore(trainer.state()) or 0) if trainer.checkpointer else 0


def _keep(trainer: Trainer, facts: Facts) -> None:
    """Save. Replicas that train alone meet first: one of them stands for all."""
    outer = trainer.layout.outer
    if outer and not outer.has_met(facts.step):
        outer.meet()
    if trainer.checkpointer:
        trainer.checkpointer.save(facts.step, trainer.state(), metrics={"loss": facts.loss})


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(trainer: Trainer, facts: Facts) -> None:
    """From rank 0, under the standard metric names."""
    if dist.get_rank() == 0:
        rates = {f"{what}_per_s": amount / facts.step_time_s for what, amount in trainer.per_step.items()}
        phalanx.report(
            step=facts.step,
            total_steps=trainer.train.steps,
            loss=facts.loss,
            grad_norm=facts.grad_norm,
            lr=facts.lr,
            step_time_s=facts.step_time_s,
            data_wait_s=facts.data_wait_s,
            **rates,
        )
