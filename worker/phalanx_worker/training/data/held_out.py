"""Which samples of a source are kept back, to try the model on.

Owns that choice: one sample out of each of equal stretches, anywhere in it. It follows from the two numbers alone,
takes no memory however many samples there are, and leaves the others in their order.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate

from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.opening import open_source
from phalanx_worker.training.data.source import Sample, Source


@dataclass(frozen=True)
class Split:
    """Of `size` samples `count` are kept back, 0 < count < size."""

    size: int
    count: int

    def kept(self, index: int) -> int:
        """The sample that is the `index`-th of those kept back."""
        begin, end = self._begin(index), self._begin(index + 1)
        return begin + _anywhere(index) % (end - begin)

    def others(self, index: int) -> int:
        """The sample that is the `index`-th of the others."""
        stretch = bisect_right(range(self.count), index, key=lambda number: self._begin(number) - number) - 1
        found = index + stretch  # one was kept back of each stretch before
        return found + (found >= self.kept(stretch))

    def _begin(self, stretch: int) -> int:
        return stretch * self.size // self.count


def _anywhere(number: int) -> int:
    return int.from_bytes(hashlib.blake2b(number.to_bytes(8), digest_size=7).digest())


class Part:
    """So many samples of a source, the first of which is `at(0)` there."""

    def __init__(self, source: Source, length: int, at: Callable[[int], int]) -> None:
        self.fingerprint = f"{source.fingerprint} spread part of {length}"
        self._source, self._length, self._at = source, length, at

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._at(index)]


def separate(config: DataConfig, evaluate: Evaluate) -> tuple[Source, Source | None]:
    """The samples to train on, and those to try the model on (None: no evaluation is wanted). Raises DataError."""
    source = open_source(config)
    if evaluate.paths:
        return source, open_source(replace(config, paths=evaluate.paths))
    if not evaluate.share:
        return source, None
    size = len(source)
    if size < 2:
        raise DataError(f"there is {size} sample, of which evaluate.share can keep none back; use 0 or more data")
    split = Split(size, min(max(1, round(evaluate.share * size)), size - 1))
    return Part(source, size - split.count, split.others), Part(source, split.count, split.kept)
