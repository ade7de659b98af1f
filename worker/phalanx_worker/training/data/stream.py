"""The endless stream of batches that one data-parallel rank is trained on.

Owns positions: the share of every global batch that is this rank's, and how far training has come. The global order
follows from the seed and the position alone, so a stream goes on exactly where another left off, on any number of ranks
and of worker processes, and with another batch size: no sample of an epoch is lost or seen twice. Reading ahead is
torch's DataLoader.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from phalanx.recipes.data import DataConfig
from torch import Tensor
from torch.utils.data import DataLoader

from phalanx_worker.runtime.linux import die_with_parent
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.opening import default_transform, open_source
from phalanx_worker.training.data.source import Arranged, Order, Source, Transform

Batch = dict[str, Tensor]


def open_stream(
    config: DataConfig,
    *,
    dp_rank: int,
    dp_size: int,
    batch: int,
    seed: int,
    device: torch.device | None = None,
    transform: Transform | None = None,
    source: Source | None = None,
) -> Stream:
    """The batches of data-parallel rank `dp_rank` of `dp_size`, from the start.

    `batch` is the global one, in samples. Tensors have the share batch / dp_size as their first dimension and lie on
    `device` (through pinned memory for CUDA). `transform` takes the place of the usual preparation of the format,
    and `source` that of all the data that `config` names.
    Raises DataError where the data cannot be used, ValueError where the ranks cannot share a batch evenly.
    """
    source = source or open_source(config)
    order = Order(size=len(source), seed=seed, shuffle=config.shuffle)
    arranged = Arranged(source, order, transform or default_transform(config))
    share = Share(batch=batch, dp_rank=dp_rank, dp_size=dp_size)
    return Stream(arranged, share, workers=config.workers, prefetch=config.prefetch, device=device)


@dataclass(frozen=True)
class Share:
    """The part of each global batch that one data-parallel rank reads: its samples stand side by side."""

    batch: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % self.dp_size:
            raise ValueError(
                f"a batch of {self.batch} samples cannot be split evenly over {self.dp_size} data-parallel ranks; "
                f"make it a multiple of {self.dp_size}"
            )
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank = {self.dp_rank} is not in 0 to {self.dp_size - 1}")

    def positions(self, begin: int) -> range:
        """This rank's positions in the global batch that begins at `begin`."""
        each = self.batch // self.dp_size
        return range(begin + self.dp_rank * each, begin + (self.dp_rank + 1) * each)


@dataclass(frozen=True)
class _Batches:
    """Batch after batch of one rank's positions, for ever: the DataLoader's batch sampler."""

    share: Share
    begin: int

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.begin
        while True:
            yield list(self.share.positions(begin))
            begin += self.share.batch


class Stream:
    """An endless iterator of batches; a torch `Stateful`.

    `position` counts the samples of the whole job that were handed out, `epoch` is position / size. `data_wait_s` is
    how long the last `next` held the caller.
    """

    def __init__(
        self,
        arranged: Arranged,
        share: Share,
        *,
        workers: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
    ):
        self.position = 0
        self.data_wait_s = 0.0
        self._arranged = arranged
        self._share = share
        self._workers = workers
        self._prefetch = prefetch
        self._device = device
        self._batches: Iterator[Batch] | None = None

    @property
    def source(self) -> Source:
        return self._arranged.source

    @property
    def size(self) -> int:
        """Samples in an epoch."""
        return self._arranged.order.size

    @property
    def epoch(self) -> float:
        return self.position / self.size

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._batches is None:
            with _signals_held():
                self._batches = iter(self._loader())
        batch = self._placed(next(self._batches))
        self.position += self._share.batch
        self.data_wait_s = time.perf_counter() - began
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank: nothing in it depends on how the job is laid out."""
        order = self._arranged.order
        return {
            "position": self.position,
            "size": order.size,
            "seed": order.seed,
            "shuffle": order.shuffle,
            "fingerprint": self.source.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken. Raises DataError where the data or the order are others."""
        mine = self.state_dict()
        changed = [name for name in mine if name != "position" and mine[name] != state_dict[name]]
        if changed:
            said = ", ".join(f"{name} was {state_dict[name]} and is {mine[name]}" for name in changed)
            raise DataError(
                f"the checkpoint was made with other data or another order ({said}); start a new job for it"
            )
        self.close()
        self.position = int(state_dict["position"])

    def close(self) -> None:
        """End the worker processes; a later `next` starts them again."""
        self._batches = None

    def _loader(self) -> DataLoader[Any]:
        # Workers are forked: they share what the source has mapped and start at once.
        settle_in = partial(_settle_in, rank_pid=os.getpid())
        ahead = {"prefetch_factor": self._prefetch, "worker_init_fn": settle_in, "multiprocessing_context": "fork"}
        return DataLoader(
            self._arranged,  # pyright: ignore[reportArgumentType]
            batch_sampler=_Batches(self._share, self.position),  # pyright: ignore[reportArgumentType]
            num_workers=self._workers,
            generator=torch.Generator(),  # its own: a loader that starts must not move on torch's random state
            pin_memory=self._device is not None and self._device.type == "cuda",
            **(ahead if self._workers else {}),
        )

    def _placed(self, batch: Batch) -> Batch:
        if self._device is None:
            return batch
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}


_STOPS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals that ask to stop waiting while workers are forked, until each ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_in(_: int, *, rank_pid: int) -> None:
    """A worker lives exactly as long as its rank: the signals that ask a job to stop are the rank's to answer, and it
    holds copies of the rank's connections, which the other ranks must see closed when the rank dies."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    die_with_parent(rank_pid)
