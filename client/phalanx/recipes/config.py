"""What every recipe's configuration holds beside its model, and what a gang demands of it. Standard library only.

Owns how long is trained, on how much at a time, and what that demands of a layout; what a model demands is its
recipe's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.optim import Optim
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError, demand_sizes
from phalanx.recipes.precision import Precision


@dataclass(frozen=True)
class Train:
    """How long, on how much at a time. `global_batch` is in sequences over all ranks, whatever the layout; each rank
    takes its share in `accumulate` parts that are summed before gradients are exchanged."""

    steps: int = 1000
    global_batch: int = 32
    accumulate: int = 1
    seed: int = 0
    report_every: int = 1

    def __post_init__(self) -> None:
        demand_sizes(self, least=1, steps=1 << 40, global_batch=1 << 30, accumulate=1 << 20, report_every=1 << 40)


Better = Literal["lowest", "highest"]


@dataclass(frozen=True)
class RecipeConfig(ABC):
    """What `args` of any recipe hold. `device` auto is a GPU where every rank of the node has one. `FOUND` is what an
    evaluation finds, and which is better."""

    FOUND: ClassVar[Mapping[str, Better]]

    data: DataConfig
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    optim: Optim = field(default_factory=Optim)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def placed(self, world_size: int) -> Self:
        """The same for a gang of `world_size` ranks: `parallel.data` filled in and everything checked against it.
        Raises `RecipeError`, whose text says which field to change to what."""
        whole = replace(self, parallel=self.parallel.filled(world_size))
        whole.check_model()
        check_batch(whole.train, whole.parallel)
        check_checkpoint(whole.checkpoint, whole.parallel)
        check_evaluate(whole.evaluate, whole.parallel)
        check_best(whole.checkpoint, whole.evaluate, self.FOUND)
        return whole

    @abstractmethod
    def check_model(self) -> None:
        """Whether the recipe has this layout, and its model these sizes under it. Raises `RecipeError`."""


def check_checkpoint(checkpoint: CheckpointConfig, parallel: Parallel) -> None:
    """Replicas that train alone are the same only right after they met. Raises `RecipeError`."""
    every = parallel.local.every
    if every and checkpoint.every_steps % every:
        text = f"= {checkpoint.every_steps} is not a multiple of parallel.local.every = {every}"
        raise RecipeError("checkpoint.every_steps", f"{text}, when replicas are equal; use one")


def check_evaluate(evaluate: Evaluate, parallel: Parallel) -> None:
    """Whose replicas train alone tries the one model that they are right after they met. Raises `RecipeError`."""
    every = parallel.local.every
    if every and evaluate.wanted and evaluate.every % every:
        text = f"= {evaluate.every} is not a multiple of parallel.local.every = {every}"
        raise RecipeError("evaluate.every", f"{text}, when replicas are equal; use one")


def check_best(checkpoint: CheckpointConfig, evaluate: Evaluate, found: Mapping[str, Better]) -> None:
    """Whether each checkpoint will have the metric by which the best are kept. Raises `RecipeError`."""
    name = checkpoint.best_metric
    better = {"loss": "lowest", **found}.get(name)
    if better is None:
        text = f"= {name!r} is nothing that this recipe measures; use one of {', '.join(('loss', *found))}"
        raise RecipeError("checkpoint.best_metric", text)
    if not checkpoint.keep_best:
        return
    if checkpoint.best != better:
        raise RecipeError("checkpoint.best", f"= {checkpoint.best}, but the {better} {name} is the best; use {better}")
    if name == "loss":
        return
    if not evaluate.wanted:
        text = f"= {name!r} comes of an evaluation; set evaluate.share or evaluate.paths, or use loss"
        raise RecipeError("checkpoint.best_metric", text)
    if not checkpoint.every_steps or evaluate.every % checkpoint.every_steps:
        text = f"= {evaluate.every} is not a multiple of checkpoint.every_steps = {checkpoint.every_steps}"
        raise RecipeError("evaluate.every", f"{text}: what is evaluated has to be kept, for checkpoint.keep_best")


def check_batch(train: Train, parallel: Parallel) -> None:
    """Whether the global batch comes out even on every rank and in every part. Raises `RecipeError`."""
    if parallel.pipeline > 1 and train.accumulate > 1:
        text = f"= {train.accumulate}, but a pipeline accumulates over its microbatches"
        raise RecipeError("train.accumulate", f"{text}; use 1 and set parallel.microbatches")
    if parallel.schedule == "interleaved" and parallel.pieces % parallel.pipeline:
        text = f"= {parallel.pieces} is not a multiple of parallel.pipeline = {parallel.pipeline}"
        raise RecipeError("parallel.microbatches", f"{text}, as the interleaved schedule needs; use one")
    parts = parallel.batch_ways * train.accumulate * parallel.pieces
    if train.global_batch % parts:
        nearest = max(1, round(train.global_batch / parts)) * parts
        text = f"= {train.global_batch} is not a multiple of data × shard × accumulate × microbatches = {parts}"
        raise RecipeError("train.global_batch", f"{text}; use {nearest}")
