"""Traces by torch.profiler, on request, from outside the script: a request is taken between two optimizer steps.

Owns the one hook that stays in training, and what a recording does to it: nothing is ever raised there, and a failure
becomes the reason that the request is told. Knows the runner only as `phalanx.job` does; where the file goes is said in
the request. The steps are those of the optimizer that is stepped first after a request; the one in which the profiler
warms up is not recorded.

A step's range must not begin or end inside the range that torch puts around `Optimizer.step`, or viewers lose one of
the two. So while it records, the optimizer's `step` is wrapped; only where a script has kept the method of before, the
hook inside of it has to do.

No recording lasts longer than RECORDING_S: then a thread says that it failed, and the next step of any optimizer ends
it. Only the thread that began a profile can end it, and ending waits for the GPU, which in the middle of a step may
wait for ever. So until that step comes collecting is only switched off, between two instructions of the main thread.
Where steps are made in another thread, or torch cannot switch it off (before 2.5), it goes on until that step.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gzip
import os
import shutil
import threading
import time
import types
from collections.abc import Callable
from time import monotonic
from typing import Any

from phalanx import job

LOOK_EVERY_S = 0.05
RECORDING_S = 120.0  # what it collects is held in memory
_UNWRAPPED_BORNE = 2  # steps that pass the hook and not the wrapped method
_COMPRESSION = 3  # of gzip: little larger than the best, in a fraction of the time
_REASON_CHARS = 300


def install(first_step: Callable[[], None]) -> None:
    """Put the hook in place; `first_step` is called after the first step. Raises ImportError or AttributeError where
    torch has no such hook."""
    import torch  # loaded already, this only gives it a name
    from torch.optim.optimizer import register_optimizer_step_post_hook

    is_compiling, profiles = torch.compiler.is_compiling, Profiles(first_step)

    def after_step(optimizer: Any, *_: Any) -> None:
        if not is_compiling():  # under torch.compile the hook must not become part of the graph
            profiles.after_step(optimizer)

    register_optimizer_step_post_hook(after_step)
    atexit.register(profiles.end)


class Profiles:
    """One request at a time, in the order in which they come."""

    def __init__(self, first_step: Callable[[], None]) -> None:
        self._first_step: Callable[[], None] | None = first_step
        self._look_at = 0.0
        self._recording: Recording | None = None
        self._writing: threading.Thread | None = None

    def after_step(self, optimizer: Any) -> None:
        """To be called after each step of any optimizer, inside of torch's range around it."""
        recording = self._recording
        if recording is not None:
            if recording.is_late or (recording.optimizer is optimizer and recording.is_not_wrapped()):
                self._go_on(recording)
        elif (now := monotonic()) >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._look(optimizer)

    def end(self) -> None:
        """The script is over."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.fail(f"the script ended after {recording.steps_done} of {recording.steps} steps")

    def _look(self, optimizer: Any) -> None:
        if self._first_step is not None:
            self._first_step()
            self._first_step = None
        if self._writing is not None and self._writing.is_alive():
            return  # the trace before takes long to write: this process does not go on to the next meanwhile
        request = job.next_profile()
        with contextlib.suppress(Exception):  # whatever it is that somebody sent
            if request is not None and time.time() < request["until"]:
                self._recording = Recording(request, optimizer, self._go_on)

    def _go_on(self, recording: Recording) -> None:
        """A step of its optimizer is over."""
        if self._recording is not recording:
            return
        try:
            if recording.go_on():
                self._recording = None
                self._writing = recording.write()
        except Exception as error:
            self._recording = None
            recording.fail(_in_words(error))


class Recording:
    """One request. `over` is called after each step of `optimizer`, which drives it by `go_on`."""

    def __init__(self, request: dict[str, Any], optimizer: Any, over: Any) -> None:
        self.steps = int(request["steps"])
        self.optimizer = optimizer
        self._id = str(request["id"])
        self._file = str(request["file"])
        self._profiler: Any = None
        self._steps_seen = 0
        self._unwrapped = 0
        self._replaced = vars(optimizer).get("step")
        self._wrapped = _method(optimizer, optimizer.step, functools.partial(over, self))
        optimizer.step = self._wrapped
        self._deciding = threading.Lock()
        self._is_decided = False
        self._thread = threading.get_ident()
        self._is_busy = False  # with the profiler
        self.is_late = False
        self._timer = _started_timer(RECORDING_S, self._be_late)

    @property
    def steps_done(self) -> int:
        return max(0, self._steps_seen - 1)

    def is_not_wrapped(self) -> bool:
        """Whether steps come that `over` is not called after; to be called in each of them."""
        self._unwrapped += 1
        return self._unwrapped > _UNWRAPPED_BORNE

    def go_on(self) -> bool:
        """Begin, or count a step; True after the last. Raises what torch does, and TimeoutError once it is late."""
        self._is_busy = True
        try:
            is_over = not self.is_late and self._take_step()
        finally:
            self._is_busy = False
        if self.is_late:
            raise TimeoutError
        return is_over

    def _take_step(self) -> bool:
        if self._unwrapped <= _UNWRAPPED_BORNE:
            self._unwrapped = 0
        if self._profiler is None:
            self._profiler = _started(self.steps)
            job.mark("profile", id=self._id, state="recording")
            return False
        self._steps_seen += 1
        self._profiler.step()
        if self._steps_seen <= self.steps:
            return False
        self._profiler.stop()
        self._unwrap()
        self._timer.cancel()
        if not self._decide():
            raise TimeoutError
        return True

    def write(self) -> threading.Thread:
        """Write the trace and say so, beside training. The interpreter waits for the thread before it ends."""
        thread = threading.Thread(target=self._write, name="phalanx-profile")
        thread.start()
        return thread

    def fail(self, reason: str) -> None:
        self._is_busy = True
        with contextlib.suppress(Exception):
            self._unwrap()
        with contextlib.suppress(Exception):
            self._profiler.stop()
        self._timer.cancel()
        self._say_failed(reason)

    def _decide(self) -> bool:
        """Whether nobody has before: a recording ends once, in the thread that steps or in that of the timer."""
        with self._deciding:
            is_first, self._is_decided = not self._is_decided, True
        return is_first

    def _say_failed(self, reason: str) -> bool:
        if not self._decide():
            return False
        job.mark("profile", id=self._id, state="failed", reason=reason)
        return True

    def _be_late(self) -> None:
        """In the thread of the timer."""
        done = f"{self.steps_done} of {self.steps} steps"
        if self._say_failed(f"it came to {done} in {RECORDING_S:.0f} s, the most that is recorded: ask for fewer"):
            self.is_late = True
            _in_main_thread(self._collect_no_more)

    def _collect_no_more(self) -> None:
        """Unless the thread of the profiler is another, or is just at it: then `go_on` sees to it."""
        if threading.get_ident() == self._thread and not self._is_busy and self._profiler is not None:
            self._profiler.toggle_collection_dynamic(False, self._profiler.activities)

    def _write(self) -> None:
        try:
            size_bytes = _write_trace(self._profiler, self._file)
        except Exception as error:
            return job.mark("profile", id=self._id, state="failed", reason=_in_words(error))
        job.mark("profile", id=self._id, state="written", bytes=size_bytes)

    def _unwrap(self) -> None:
        """Unless somebody has wrapped it again meanwhile: then it stays, and does nothing."""
        if vars(self.optimizer).get("step") is not self._wrapped:
            return
        if self._replaced is None:
            del self.optimizer.step
        else:
            self.optimizer.step = self._replaced


def _started_timer(after_s: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(after_s, call)
    timer.name, timer.daemon = "phalanx-profile-limit", True
    timer.start()
    return timer


_called: list[Any] = []  # functions must outlive the calls that C makes of them


def _in_main_thread(call: Callable[[], None]) -> None:
    """Have the interpreter call it between two instructions of the main thread, as it does with signals' handlers."""

    def called(_: Any) -> int:
        with contextlib.suppress(Exception):
            call()
        return 0

    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(called)
    _called.append(function)  # for good: few are ever made
    ctypes.pythonapi.Py_AddPendingCall(function, None)


def _method(optimizer: Any, step: Any, over: Any) -> Any:
    """`step` with `over` after it. A bound method, as learning rate schedulers expect of an optimizer's `step`."""

    @functools.wraps(step)
    def wrapped(_self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        over()
        return result

    return types.MethodType(wrapped, optimizer)


def _started(steps: int) -> Any:
    import torch  # loaded already
    from torch import profiler

    autograd: Any = torch.autograd
    if autograd._profiler_enabled():
        raise RuntimeError("the script records a profile of its own at this moment")
    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(profiler.ProfilerActivity.CUDA)
    schedule = profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    started = profiler.profile(activities=activities, schedule=schedule, record_shapes=True)
    started.start()
    return started


def _write_trace(profiler: Any, file: str) -> int:
    """Its size in bytes."""
    plain = f"{file}.json"
    try:
        profiler.export_chrome_trace(plain)
        with open(plain, "rb") as source, gzip.open(file, "wb", _COMPRESSION) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(plain)  # noqa: PTH108 - pathlib is not loaded for it
    return os.stat(file).st_size  # noqa: PTH116


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_REASON_CHARS]
