"""Times what a rank cannot hide of its communication: how long it stands still for others.

Owns the places where torch waits. On a CPU they are timed; on a GPU, where nothing waits in Python, by events on the
stream that computes, which are read later: no step is synchronised for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

Event = torch.cuda.Event


class Waits:
    """While entered, `took()` tells how much time this rank's training has been held up since the last call.

    Three places are covered: `Work.wait` (FSDP, pipelines, plain collectives), `wait_tensor` (tensor parallelism) and,
    on GPUs, `Stream.wait_event` (FSDP's streams); there is no public hook for these, so they are replaced while this is
    entered. DistributedDataParallel waits in C++ at the end of backward: of modules that are `watch`ed, the time
    between the last gradient and the end of backward counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: Callable[[], Any] = self._event_now if device.type == "cuda" else time.perf_counter
        self._thread = threading.get_ident()
        self._depth = 0
        self._began: Any = 0.0  # a time, or on a GPU an event
        self._held_s = 0.0
        self._events: list[tuple[Event, Event]] = []
        self._hooks: list[Any] = []
        self._before: list[tuple[Any, str, Any]] = []

    def watch(self, module: nn.Module) -> None:
        """Count what backward through this module waits at its end. That backward has begun is seen at a parameter,
        since a hook that stays there costs a tenth of one on every output; FSDP computes with copies of its own."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if isinstance(module, FSDPModule) or not trained:
            self._hooks.append(module.register_forward_hook(self._on_output))
        else:
            self._hooks.append(trained[-1].register_hook(self._on_backward))

    def took(self) -> Callable[[], float]:
        """The seconds since the last call, to be read when they are needed: on a GPU reading waits for these steps."""
        held_s, events = self._held_s, self._events
        self._held_s, self._events = 0.0, []
        return lambda: held_s + sum(_elapsed_s(*pair) for pair in events)

    def __enter__(self) -> Waits:
        self._replace(dist.Work, "wait")
        self._replace(functional, "wait_tensor")
        if self._device.type == "cuda":
            self._replace(torch.cuda.Stream, "wait_event", only=self._is_training_stream)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._before:
            setattr(owner, name, original)
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks = [], []

    def _replace(self, owner: Any, name: str, only: Callable[..., bool] | None = None) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_training_thread() or (only and not only(*args)):
                return original(*args, **kwargs)
            self._enter()
            try:
                return original(*args, **kwargs)
            finally:
                self._leave()

        self._before.append((owner, name, original))
        setattr(owner, name, timed)

    def _is_training_thread(self) -> bool:
        """Not the threads that save checkpoints or load data. Backward of a GPU runs in a thread that torch made."""
        if threading.get_ident() == self._thread:
            return True
        return self._device.type == "cuda" and isinstance(threading.current_thread(), threading._DummyThread)

    def _is_training_stream(self, stream: torch.cuda.Stream, *_: Any) -> bool:
        return stream == torch.cuda.current_stream(self._device)

    def _enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began = self._now()

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            ended = self._now()
            if isinstance(self._began, float):
                self._held_s += ended - self._began
            else:
                self._events.append((self._began, ended))

    def _event_now(self) -> Event:
        event = Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._on_backward)

    def _on_backward(self, _grad: Tensor) -> None:
        """Backward begins. What is queued runs at its end, in this order: this, what DDP or FSDP queue to wait for
        their collectives, and what this queues then."""
        Variable._execution_engine.queue_callback(self._on_last_gradient)

    def _on_last_gradient(self) -> None:
        self._enter()
        Variable._execution_engine.queue_callback(self._leave)


def _elapsed_s(began: Event, ended: Event) -> float:
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
