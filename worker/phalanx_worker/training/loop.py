"""The training loop: next batch, forward and backward, clip, update, report, keep, until done or asked to stop.

Owns the order of these. What a step computes is the layout's business, what is stored the checkpointer's, and what is
made of the numbers the monitor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import phalanx
import torch
import torch.distributed as dist
from phalanx.recipes.config import Train
from phalanx.recipes.optim import Optim
from phalanx.recipes.precision import Precision
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from phalanx_worker.training.health.life import life
from phalanx_worker.training.health.recompute import Again, Pulse
from phalanx_worker.training.metrics.work import Work
from phalanx_worker.training.monitor import Monitor
from phalanx_worker.training.optim import clip, divide, global_norm, make_optimizer, set_rate
from phalanx_worker.training.parallel.layout import Layout
from phalanx_worker.training.precision import LossScale
from phalanx_worker.training.state import ModelState, OptimizerState

Batch = Mapping[str, Tensor]


class Checkpointer(Protocol):
    """Keeps the training state; every rank calls each method at the same step."""

    def save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        /,
        *,
        metrics: Mapping[str, float],
        keep_before: int | None = None,
    ) -> object:
        """However many are kept, the newest that is older than `keep_before` is."""
        ...

    def restore(self, state: Mapping[str, Stateful], /, *, before: int | None = None) -> int | None: ...

    def rate(self, step: int, metrics: Mapping[str, float], /) -> None:
        """What an evaluation found of the state that was saved or restored last, at this step."""
        ...

    def finish(self) -> None:
        """The last save is complete, else this raises."""
        ...


@dataclass(frozen=True)
class Facts:
    """What is known of a step, on every rank. `loss` is the global batch's mean and `grad_norm` the global norm before
    clipping (of replicas that train alone, each its own); `updated` is False where fp16 gradients overflowed or the
    monitor or a watcher refused, and the step was skipped."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    updated: bool
    step_time_s: float
    data_wait_s: float


class Observer(Protocol):
    """What the loop tells at each place of a step; `Monitor` is the real one."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def before_step(self, step: int) -> None: ...

    def before_forward(self) -> None: ...

    def after_backward(self, pulse: Pulse, again: Again) -> tuple[Pulse, bool]: ...

    def after_step(self, facts: Facts, *, keeps: bool) -> int | None: ...

    def state(self) -> Stateful | None:
        """What it has to know of the steps before to look on."""
        ...

    def keep_before(self, step: int) -> int | None:
        """The step before which training may yet have to go back to a checkpoint, as of this one, if so."""
        ...

    def after_keep(self, step: int, stall_s: float) -> None: ...

    def returned(self, step: int | None) -> None: ...

    def finished(self, step: int, waited_s: float) -> None: ...


class Watcher(Protocol):
    """Looks on. `after_backward` may refuse the update (skip this batch): it sees what all ranks see (but for
    `grad_norm` where replicas train alone), and all have to answer alike."""

    def after_backward(self, step: int, loss: float, grad_norm: float) -> bool: ...

    def after_step(self, facts: Facts) -> None: ...


class Evaluator(Protocol):
    """Tries the model on other data when it is time; every rank is called at the same steps, which are kept by then.
    `interrupted`: the last time it gave way to a request to stop."""

    interrupted: bool

    def after_step(self, step: int) -> Mapping[str, float]:
        """What it found; nothing where it is not time, or it gave way."""
        ...


@dataclass
class Trainer:
    """A model in its layout together with all that a step needs and a checkpoint keeps."""

    layout: Layout
    batches: Iterator[Batch]
    train: Train
    optim: Optim
    precision: Precision
    watchers: Sequence[Watcher] = ()
    evaluation: Evaluator | None = None
    checkpointer: Checkpointer | None = None
    checkpoint_every: int = 0  # steps; 0: at the end and when asked to stop
    per_step: Mapping[str, int] = field(default_factory=dict)  # what a step consumes, to report: {"tokens": 65536}
    work: Callable[[], Work] | None = None  # counts the whole model's parameters and FLOPs

    def __post_init__(self) -> None:
        self.optimizers = [make_optimizer(self.optim, module) for module in self.layout.modules]
        self.scale = LossScale(self.precision)
        self.monitor: Observer = Monitor(
            self.layout,
            self.train,
            precision=self.precision.compute,
            per_step=self.per_step,
            work=self.work,
            can_return=self.checkpointer is not None,
        )

    def state(self) -> dict[str, Stateful]:
        """All that a checkpoint has to hold, by name."""
        parts = {
            "model": ModelState(self.layout.modules),
            "optimizer": OptimizerState(self.layout.modules, self.optimizers),
            "loss_scale": self.scale,
            "outer": self.layout.outer,
            "stream": self.batches if hasattr(self.batches, "state_dict") else None,
            "health": self.monitor.state(),
        }
        return {name: part for name, part in parts.items() if part is not None}  # pyright: ignore[reportReturnType]


def train(trainer: Trainer) -> Facts | None:
    """Train from the last checkpoint, or from the start, to the last step. Gives the last step's facts, or None where
    nothing was left to do. Raises CheckpointError where the state at the end could not be saved."""
    step, facts, stop = _resume(trainer), None, False
    if step >= trainer.train.steps:
        _evaluate(trainer, step)  # what ended it may have been the last evaluation
    with trainer.monitor as monitor:
        while step < trainer.train.steps and not stop:
            step += 1
            facts, stop = _step(trainer, step)
            for watcher in trainer.watchers:
                watcher.after_step(facts)
            keeps = stop or step == trainer.train.steps or _is_due(step, trainer.checkpoint_every)
            before = monitor.after_step(facts, keeps=keeps)
            if before is not None:
                step, stop = _go_back(trainer, before), False  # who is to stop takes a step that counts before
                continue
            if keeps:
                _keep(trainer, facts)
            _evaluate(trainer, step)
        waited_s = _finish(trainer)
        if facts:
            monitor.finished(step, waited_s)
    return facts


def _step(trainer: Trainer, step: int) -> tuple[Facts, bool]:
    """One step; and whether any rank was asked to stop."""
    monitor, layout = trainer.monitor, trainer.layout
    monitor.before_step(step)
    began = time.perf_counter()
    batch = next(trainer.batches)
    waited = time.perf_counter() - began
    rate = trainer.optim.lr * trainer.optim.schedule.factor(step, steps=trainer.train.steps)
    set_rate(trainer.optimizers, rate)

    monitor.before_forward()
    compute = partial(_compute, trainer, step, batch)
    pulse, wanted = monitor.after_backward(compute(), compute)
    norm = float(pulse.norm)  # the ranks have just agreed, so nothing is waited for; after the update a GPU would be
    answers = [watcher.after_backward(step, pulse.loss, norm) for watcher in trainer.watchers]  # all are asked
    updated = _update(trainer, pulse, scale=trainer.scale.scale, wanted=wanted and all(answers))
    if layout.outer:
        layout.outer.after(step)
    took = time.perf_counter() - began
    return Facts(step, pulse.loss, norm, rate, updated, step_time_s=took, data_wait_s=waited), pulse.stop


def _compute(trainer: Trainer, step: int, batch: Batch) -> Pulse:
    """Forward and backward: leaves the gradients, and gives what all ranks have to know of them."""
    layout, scale = trainer.layout, trainer.scale.scale
    _drop_gradients(trainer)
    own_loss = layout.run(batch, loss_scale=scale)
    norm = global_norm(layout.parameters(), layout.world.group("pipeline")) / scale
    loss, stops, bad_losses, bad = _agree(own_loss, norm, phalanx.should_stop())
    may_overflow = scale > 1  # the loss scale sees to it
    return Pulse(step, loss, own_loss, norm, bad_losses if may_overflow else bad, finite=not bad, stop=stops > 0)


def _update(trainer: Trainer, pulse: Pulse, *, scale: float, wanted: bool) -> bool:
    """Clip and update, unless the gradients overflowed or it is not wanted; gradients are gone afterwards, and nothing
    of refused ones comes into a later step."""
    ok = trainer.scale.accept(finite=pulse.finite) and wanted
    if ok:
        parameters = list(trainer.layout.parameters())
        if scale != 1.0:
            divide(parameters, scale)
        if trainer.optim.clip:
            clip(parameters, norm=pulse.norm, limit=trainer.optim.clip)
        for optimizer in trainer.optimizers:
            optimizer.step()
    else:
        trainer.layout.forget_left_out()
    _drop_gradients(trainer)
    return ok


def _drop_gradients(trainer: Trainer) -> None:
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)


def _agree(own_loss: Tensor | None, norm: Tensor, stop: bool) -> tuple[float, int, int, int]:
    """The mean over those ranks that have a loss, how many ranks want to stop (all leave at the same step), how many
    have a loss that is not finite, and how many a loss or a gradient."""
    mine = torch.tensor([0.0, own_loss is not None, stop, 0.0, 0.0], device=norm.device)
    if own_loss is not None:
        mine[0] = own_loss
    mine[3] = ~mine[0].isfinite()
    mine[4] = ~(mine[0] + norm).isfinite()
    dist.all_reduce(mine)
    total, count, *counts = mine.tolist()
    stops, bad_losses, bad = map(int, counts)
    return total / count, stops, bad_losses, bad


def _resume(trainer: Trainer) -> int:
    """The step that the restored state is of; 0 for a fresh start."""
    return (_restore(trainer, trainer.state()) or 0) if trainer.checkpointer else 0


def _go_back(trainer: Trainer, before: int) -> int:
    """Restore all but the place in the data from a checkpoint older than that step: training goes on after what led
    astray. Gives the checkpoint's step."""
    state = {name: part for name, part in trainer.state().items() if name != "stream"}
    step = _restore(trainer, state, before=before)
    trainer.monitor.returned(step)
    assert step is not None, "the monitor ends the attempt otherwise"
    return step


def _restore(trainer: Trainer, state: Mapping[str, Stateful], *, before: int | None = None) -> int | None:
    """The step whose state is restored, without what was left out of gradients since."""
    assert trainer.checkpointer is not None, "the monitor was told so"
    with life.around():
        step = trainer.checkpointer.restore(state, before=before)
    trainer.layout.forget_left_out()
    return step


def _keep(trainer: Trainer, facts: Facts) -> None:
    """Save. Replicas that train alone meet first: one of them stands for all."""
    outer = trainer.layout.outer
    if outer and not outer.has_met(facts.step):
        outer.meet()
    if trainer.checkpointer:
        began = time.perf_counter()
        with life.around():
            keep_before = trainer.monitor.keep_before(facts.step)
            trainer.checkpointer.save(
                facts.step, trainer.state(), metrics={"loss": facts.loss}, keep_before=keep_before
            )
        trainer.monitor.after_keep(facts.step, time.perf_counter() - began)


def _evaluate(trainer: Trainer, step: int) -> None:
    found = trainer.evaluation.after_step(step) if trainer.evaluation else {}
    if found and trainer.checkpointer:
        with life.around():
            trainer.checkpointer.rate(step, found)


def _finish(trainer: Trainer) -> float:
    """Wait for what is still being written; how long it took."""
    began = time.perf_counter()
    if trainer.checkpointer:
        with life.around():
            trainer.checkpointer.finish()
    return time.perf_counter() - began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
