"""Counts what goes over the wire, to compare layouts: every collective and every send that torch dispatches."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

COLLECTIVES = ("c10d", "_c10d_functional")
WITHOUT_BYTES = {"wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "recv_"}


class Traffic:
    """While it is entered, `sent[operation]` grows: [calls, bytes that this rank put in]. For measurements, not for
    production: every operation of the forward and backward passes through it.

    What follows on a future (the second and third exchange of PowerSGD) runs in a thread of the backend, which knows
    nothing of dispatch modes: `Future.then` is replaced meanwhile, so that it is counted too.
    """

    def __init__(self) -> None:
        self.sent: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._counting = _Counting(self.sent)

    @property
    def bytes(self) -> int:
        """All that this rank put in."""
        return sum(count[1] for count in self.sent.values())

    def __enter__(self) -> Traffic:
        self._then = torch._C.Future.then
        torch._C.Future.then = self._counted(self._then)
        self._counting.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counting.__exit__(*error)
        torch._C.Future.then = self._then

    def _counted(self, then: Callable[..., Any]) -> Callable[..., Any]:
        """`Future.then`, whose callback is counted wherever it runs; only once where the future is complete already."""

        def counted_then(future: Any, callback: Callable[[Any], Any]) -> Any:
            def counted(done: Any) -> Any:
                if any(isinstance(mode, _Counting) for mode in _get_current_dispatch_mode_stack()):
                    return callback(done)
                with _Counting(self.sent):
                    return callback(done)

            return then(future, counted)

        return counted_then


class _Counting(TorchDispatchMode):
    """Of one thread, and of those that autograd starts from it."""

    _adding = threading.Lock()

    def __init__(self, sent: dict[str, list[int]]) -> None:
        super().__init__()
        self._sent = sent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it turn into plain tensors and collectives first
        if func.namespace in COLLECTIVES and func._opname not in WITHOUT_BYTES:
            size = sum(tensor.numel() * tensor.element_size() for tensor in _given(func, args))
            with self._adding:
                count = self._sent[func._opname]
                count[0] += 1
                count[1] += size
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
