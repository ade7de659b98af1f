"""Counts what goes over the wire, to compare layouts: every collective and every send that torch dispatches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("c10d", "_c10d_functional")
WITHOUT_BYTES = {"wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "recv_"}


class Traffic(TorchDispatchMode):
    """While it is entered, `sent[operation]` grows: [calls, bytes that this rank put in]. For measurements, not for
    production: every operation of the forward and backward passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    @property
    def bytes(self) -> int:
        """All that this rank put in."""
        return sum(count[1] for count in self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it turn into plain tensors and collectives first
        if func.namespace in COLLECTIVES and func._opname not in WITHOUT_BYTES:
            count = self.sent[func._opname]
            count[0] += 1
            count[1] += sum(tensor.numel() * tensor.element_size() for tensor in _given(func, args))
        return func(*args, **(kwargs or {}))


def _given(func: Any, args: Any) -> Iterator[torch.Tensor]:
    """The tensors that go in. An operation that takes its output first gets it as an argument too."""
    skip = 1 if func._opname in ("_allgather_base_", "_reduce_scatter_base_") else 0
    return _tensors(args[skip:])


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
