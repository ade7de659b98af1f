"""Trying a model on samples that it is not trained on, every so many steps.

Owns which samples are kept back and that every rank takes its share of them; what is made of the answers is the
recipe's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import phalanx
import torch
from phalanx.recipes.config import Train
from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate
from torch import Tensor

from phalanx_worker.training.data.opening import open_source
from phalanx_worker.training.data.source import Arranged, Order, Sample, Source, Transform
from phalanx_worker.training.data.stream import Share, Stream
from phalanx_worker.training.health.life import life
from phalanx_worker.training.loop import Facts
from phalanx_worker.training.mesh import World

KEPT_BACK = 0x5EED  # of the order that chooses: the same samples for every seed


class Part:
    """Some samples of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.fingerprint = f"{source.fingerprint} part of {len(indices)}"
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[int(self._indices[index])]


def separate(config: DataConfig, evaluate: Evaluate) -> tuple[Source, Source | None]:
    """The samples to train on, and those to try the model on (None: no evaluation). Raises DataError."""
    source = open_source(config)
    if evaluate.paths:
        return source, open_source(replace(config, paths=evaluate.paths))
    count = round(evaluate.share * len(source))
    if not 0 < count < len(source):
        return source, None
    order = Order(len(source), seed=KEPT_BACK, shuffle=True).samples(np.arange(len(source)))
    return Part(source, np.sort(order[count:])), Part(source, np.sort(order[:count]))


class HeldOut:
    """The samples to try the model on, in their order, in batches: a rank takes its share of each."""

    def __init__(
        self, source: Source, config: DataConfig, world: World, *, batch: int, transform: Transform | None = None
    ):
        ways = world.parallel.batch_ways
        self._share = Share(batch=-(-batch // ways) * ways, dp_rank=world.batch_rank, dp_size=ways)
        self._arranged = Arranged(source, Order(len(source), seed=0, shuffle=False), transform)
        self._config, self._world = config, world

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Batches, and which of their samples count (the last batch is filled up with others). All ranks get as many:
        the model's collectives need it. Each is a sign of life."""
        size, batch = self._arranged.order.size, self._share.batch
        stream = Stream(self._arranged, self._share, prefetch=self._config.prefetch, device=self._world.device)
        for begin in range(0, size, batch):
            counts = [position < size for position in self._share.positions(begin)]
            life.show()
            yield next(stream), torch.tensor(counts, device=self._world.device)


class Examiner(Protocol):
    """What a recipe makes of the held-out samples; every rank calls it at the same step."""

    def __call__(self) -> Mapping[str, float]: ...


class Evaluation:
    """A watcher of the loop that examines the model when it is time and reports what came out."""

    def __init__(self, examine: Examiner, evaluate: Evaluate, train: Train) -> None:
        self._examine, self._evaluate, self._train = examine, evaluate, train
        self.last: Mapping[str, float] = {}

    def after_backward(self, step: int, loss: float, grad_norm: Tensor) -> bool:
        return True

    def after_step(self, facts: Facts) -> None:
        if facts.step % self._evaluate.every and facts.step != self._train.steps:
            return
        self.last = self._examine()
        if torch.distributed.get_rank() == 0:
            phalanx.report(step=facts.step, total_steps=self._train.steps, **self.last)
