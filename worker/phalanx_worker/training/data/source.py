"""What a source of samples is, and in which order its samples come.

Owns the protocol that every kind of data meets and the mapping from a position in training to a sample. Positions count
the samples of the whole job, epoch after epoch; nothing here knows ranks, workers or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from phalanx_worker.training.data.permutation import Indices, key_of, permuted

Sample = dict[str, Any]  # names to tensors or plain numbers, alike for every sample
Transform = Callable[[Sample, torch.Generator], Sample]

_ORDER, _TRANSFORM = 1, 2  # what a random choice is for: no two uses share a key


class Source(Protocol):
    """A fixed number of samples, each found by its index; may be used in other processes after a fork."""

    fingerprint: str  # names the data: a stream does not go on in other data

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Order:
    """Which sample stands at a position: every epoch has each of the `size` samples once, in an order of its own."""

    size: int
    seed: int
    shuffle: bool

    def samples(self, positions: Indices) -> Indices:
        """The indices of the samples at the positions (from 0, over all epochs)."""
        epochs, within = np.divmod(positions, self.size)
        if not self.shuffle:
            return within
        indices = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = key_of(_ORDER, self.seed, int(epoch))
            indices[chosen] = permuted(within[chosen], size=self.size, key=key)
        return indices


@dataclass(frozen=True)
class Arranged:
    """A source, in order: a torch map-style dataset whose keys are positions.

    A transform gets a generator of its own for each position, so augmentation too is the same on any number of ranks
    and workers, and after a resume.
    """

    source: Source
    order: Order
    transform: Transform | None = None

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        indices = self.order.samples(np.asarray(positions, dtype=np.int64))
        return [self._sample(position, int(index)) for position, index in zip(positions, indices, strict=True)]

    def _sample(self, position: int, index: int) -> Sample:
        sample = self.source[index]
        if self.transform is None:
            return sample
        generator = torch.Generator().manual_seed(key_of(_TRANSFORM, self.order.seed, position) >> 1)
        return self.transform(sample, generator)
