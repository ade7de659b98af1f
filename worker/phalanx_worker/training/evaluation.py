"""Trying a model on samples that it is not trained on, every so many steps.

Owns when, that every rank takes its share of the samples, and that it gives way to a request to stop; which samples
these are is the data's business (`data/held_out.py`), and what is made of the answers the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import phalanx
import torch
import torch.distributed as dist
from phalanx.recipes.config import RecipeConfig
from torch import Tensor

from phalanx_worker.training.data.held_out import separate
from phalanx_worker.training.data.source import Arranged, Order, Source, Transform
from phalanx_worker.training.data.stream import Share, Stream, open_stream
from phalanx_worker.training.health.life import life
from phalanx_worker.training.mesh import World


class Interrupted(Exception):
    """A rank was asked to stop while the model was tried."""


class HeldOut:
    """The samples to try the model on, in their order, in batches: a rank takes its share of each."""

    def __init__(self, source: Source, config: RecipeConfig, world: World, *, transform: Transform | None = None):
        ways = world.parallel.batch_ways
        batch = config.evaluate.batch or config.train.global_batch // config.train.accumulate
        self._share = Share(batch=-(-batch // ways) * ways, dp_rank=world.batch_rank, dp_size=ways)
        self._arranged = Arranged(source, Order(len(source), seed=0, shuffle=False), transform)
        self._prefetch, self._device = config.data.prefetch, world.device

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Batches, and which of their samples count (the last batch is filled up with others). All ranks get as many:
        the model's collectives need it. Each is a sign of life. Raises Interrupted on all ranks, before the same
        batch."""
        size, batch = self._arranged.order.size, self._share.batch
        stream = Stream(self._arranged, self._share, prefetch=self._prefetch, device=self._device)
        for begin in range(0, size, batch):
            counts = [position < size for position in self._share.positions(begin)]
            life.show()
            self._give_way()
            yield next(stream), torch.tensor(counts, device=self._device)

    def _give_way(self) -> None:
        stops = torch.tensor(float(phalanx.should_stop()), device=self._device)
        dist.all_reduce(stops)
        if stops:
            raise Interrupted


def open_samples(
    config: RecipeConfig, world: World, *, transform: Transform | None = None, plain: Transform | None = None
) -> tuple[Stream, HeldOut | None]:
    """This rank's stream to train on, and the samples to try the model on (None: no evaluation is wanted). `transform`
    takes the place of the usual preparation of the format for the first, `plain` for the second. Raises DataError."""
    source, kept_back = separate(config.data, config.evaluate)
    stream = open_stream(
        config.data,
        dp_rank=world.batch_rank,
        dp_size=world.parallel.batch_ways,
        batch=config.train.global_batch,
        seed=config.train.seed,
        device=world.device,
        transform=transform,
        source=source,
    )
    return stream, HeldOut(kept_back, config, world, transform=plain) if kept_back else None


class Examiner(Protocol):
    """What a recipe makes of the held-out samples; every rank calls it at the same step."""

    def __call__(self) -> Mapping[str, float]: ...


class Evaluation:
    """Examines the model when it is time and reports what came out, unless it is interrupted."""

    def __init__(self, examine: Examiner, config: RecipeConfig) -> None:
        self._examine, self._evaluate, self._train = examine, config.evaluate, config.train
        self.last: Mapping[str, float] = {}
        self.interrupted = False

    def after_step(self, step: int) -> Mapping[str, float]:
        if step % self._evaluate.every and step < self._train.steps:
            return {}
        try:
            self.last, self.interrupted = self._examine(), False
        except Interrupted:
            self.interrupted = True
            return {}
        if dist.get_rank() == 0:
            phalanx.report(step=step, total_steps=self._train.steps, **self.last)
        return self.last
