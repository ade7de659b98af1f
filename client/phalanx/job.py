"""What training code says to Phalanx from inside a rank: progress, checkpoints, whether to stop.

Owns the rank's end of the report socket (`PHALANX_REPORT_FD`, inherited from the node runner). Knows no server, no
token and no file but that socket. Standard library only; outside a job every function does nothing. Nothing here ever
raises into training: what cannot be sent is dropped and counted, and the count is sent as soon as something can be.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_MESSAGE_BYTES = 32 * 1024
MARK_WAIT_S = 0.2  # how long a mark (checkpoint, finished) may wait for room; a metric never waits
EXIT_WAIT_S = 1.0  # and what still waits when the process ends
_MAX_PENDING_MARKS = 64
_MAX_PROFILES = 8  # that wait: the server has one open at a time


def report(*, step: int | None = None, total_steps: int | None = None, **metrics: Any) -> None:
    """Report numbers of this rank, for example `report(step=120, total_steps=1000, loss=2.31, lr=3e-4)`.

    Values may be ints, floats, or NumPy or torch scalars; NaN and infinities are kept as such. Never blocks and never
    raises: when the node is overloaded the point is dropped and counted. One exception to "never blocks" is of the
    caller's making: reading a CUDA tensor waits for the GPU, so pass `loss.item()` only where the loop has it anyway.

    An elastic job grows by what it reports: `tokens_per_s`, `samples_per_s` or `global_batch`, of the whole job, from
    rank 0; else its steps count.
    """
    link = _link()
    if link is not None:
        link.metrics(step=step, total_steps=total_steps, values=metrics)


def checkpoint(path_or_url: str | os.PathLike[str], *, step: int | None = None, **data: Any) -> None:
    """Register a checkpoint as complete: the next attempt finds it in `PHALANX_RESUME_FROM`.

    A relative path is taken inside `PHALANX_CHECKPOINT_DIR`. Call it on one rank, after every rank has written. Without
    `step` it is of the step that this rank has reported last. `data` is stored with it: JSON, or numbers as for
    `report`; what is neither is dropped and counted.
    """
    link = _link()
    if link is not None:
        at_step = link.last_step if step is None else _whole(step)
        link.mark("checkpoint", {"url": _resolve(str(path_or_url)), "step": at_step}, extra=data)


def should_stop() -> bool:
    """True once Phalanx has asked this job to end (preemption, time limit, cancel): save and leave the loop.

    The first call replaces the default action of SIGTERM, which is to die at once, by remembering it; a handler that
    the script installed itself is left alone.
    """
    link = _link()
    return link is not None and link.should_stop()


def alive() -> None:
    """Say that the job goes on although it reports no step now: in a long evaluation, say. Its node looks for hangs
    (`health.hang` of the job file). At most every few seconds is enough."""
    link = _link()
    if link is not None:
        link.alive()


def finished() -> None:
    """Say that the work is complete: if this attempt is being preempted, the job must not be started again."""
    link = _link()
    if link is not None:
        link.mark("finished", {})


def mark(kind: str, **data: Any) -> None:
    """Say that something happened once in this rank (used by the runtime: `rendezvous`, `first_step`, `profile`)."""
    link = _link()
    if link is not None:
        link.mark(kind, data)


def next_profile() -> dict[str, Any] | None:
    """The oldest profile that was asked of this rank and not taken yet (used by the runtime)."""
    link = _link()
    return link.next_profile() if link is not None else None


class _Link:
    """The rank's end of the socket. Safe from any thread: every message is one datagram."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING_MARKS)
        self._dropped = 0
        self._gone = False  # the runner's end
        self.last_step = 0
        self._total_steps: int | None = None
        self._stop = False  # a plain flag: a signal handler must not take a lock
        self._profiles: deque[dict[str, Any]] = deque(maxlen=_MAX_PROFILES)
        self._watches_sigterm = False

    def metrics(self, *, step: Any, total_steps: Any, values: dict[str, Any]) -> None:
        at = time.time()
        self.last_step = _whole(step) or self.last_step
        total = _whole(total_steps)
        if total is not None and total != self._total_steps:
            self._total_steps = total
            self.mark("progress", {"total_steps": total}, wait_s=0.0)
        numbers = {name: number for name, value in values.items() if (number := _number(value)) is not None}
        self._dropped += len(values) - len(numbers)
        message = _datagram({"t": "metrics", "at": at, "step": _whole(step), "values": numbers})
        if message is None:
            self._dropped += len(numbers)
        elif not (self._flush() and self._send(message)):
            self._dropped += max(1, len(numbers))

    def mark(
        self, kind: str, data: dict[str, Any], *, extra: Mapping[str, Any] | None = None, wait_s: float = MARK_WAIT_S
    ) -> None:
        """`extra` goes with it as far as it can be sent; the mark itself is not lost for it."""
        envelope = {"t": "mark", "kind": kind, "at": time.time()}
        sendable = _sendable(extra or {})
        message = _datagram({**envelope, "data": {**sendable, **data}})
        if message is None:
            sendable, message = {}, _datagram({**envelope, "data": data})
        self._dropped += len(extra or {}) - len(sendable)
        if message is None:
            self._dropped += 1
            return
        self._pending.append(message)
        deadline = time.monotonic() + wait_s
        while not self._flush() and time.monotonic() < deadline:
            time.sleep(0.005)

    def alive(self) -> None:
        """Now or not at all: what waits is worth more, and the next sign says the same."""
        if self._flush():
            self._send(json.dumps({"t": "mark", "kind": "alive", "at": time.time(), "data": {}}).encode())

    def settle(self, wait_s: float = EXIT_WAIT_S) -> None:
        """Send what still waits, and how much was dropped: no later report would say so."""
        deadline = time.monotonic() + wait_s
        while not (self._flush() and not self._dropped) and not self._gone and time.monotonic() < deadline:
            time.sleep(0.005)

    def should_stop(self) -> bool:
        self._watch_sigterm()
        self._hear()
        return self._stop

    def next_profile(self) -> dict[str, Any] | None:
        self._hear()
        try:
            return self._profiles.popleft()
        except IndexError:
            return None

    def _hear(self) -> None:
        """Take what the runner has said since, until it says to stop."""
        while not self._stop:
            try:
                data = self._socket.recv(4096, socket.MSG_DONTWAIT)
                message = json.loads(data) if data else None
            except (OSError, ValueError):
                return
            if not isinstance(message, dict):
                return
            if message.get("t") == "stop":
                self._stop = True
            elif message.get("t") == "profile":
                self._profiles.append(message)

    def _watch_sigterm(self) -> None:
        if self._watches_sigterm or threading.current_thread() is not threading.main_thread():
            return
        self._watches_sigterm = True
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, _number: int, _frame: Any) -> None:
        self._stop = True

    def _flush(self) -> bool:
        """Send what waits, oldest first; False if something still waits."""
        if self._dropped and not self._pending:
            lost, self._dropped = self._dropped, 0
            data = {"t": "mark", "kind": "dropped", "at": time.time(), "data": {"what": "metrics", "count": lost}}
            self._pending.append(json.dumps(data).encode())
        while self._pending:
            try:
                message = self._pending.popleft()
            except IndexError:  # another thread sent it
                return True
            if not self._send(message):
                self._pending.appendleft(message)
                return False
        return True

    def _send(self, message: bytes) -> bool:
        try:
            self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            self._gone = not isinstance(error, BlockingIOError)
            return False
        return True


_link_lock = threading.Lock()
_links: dict[str, _Link | None] = {}  # by the value of PHALANX_REPORT_FD, which a fork of the warm process changes


def _link() -> _Link | None:
    number = os.environ.get("PHALANX_REPORT_FD", "")
    if number not in _links:
        with _link_lock:
            if number not in _links:
                _links[number] = _open_link(number)
    return _links[number]


def _open_link(number: str) -> _Link | None:
    """The link on an inherited socket; none where the variable outlived the socket, as in a child without it."""
    try:
        if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
            return None
        connection = socket.socket(fileno=int(number))
        if connection.type != socket.SOCK_SEQPACKET:
            return _abandon(connection)
    except (ValueError, OSError):
        return None
    link = _Link(connection)
    atexit.register(link.settle)
    return link


def _abandon(connection: socket.socket) -> None:
    connection.detach()  # somebody else's socket: neither used nor closed


def _datagram(message: dict[str, Any]) -> bytes | None:
    try:
        encoded = json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return None
    return encoded if len(encoded) <= MAX_MESSAGE_BYTES else None


def _sendable(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can carry of the values: as they are, else as numbers."""
    plain = {name: value if _datagram({name: value}) else _number(value) for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None or values[name] is None}


def _number(value: Any) -> float | int | str | None:
    """A reported value as JSON can carry it: a number, or "nan", "inf", "-inf"; None if it is not a single number."""
    if not isinstance(value, int | float):
        try:
            value = value.item()
        except Exception:  # not a scalar of any kind: whatever it raises is not training's business
            return None
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else float(value) if abs(value) < 1 << 1000 else None
    if not isinstance(value, float):
        return None
    return float(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _whole(value: Any) -> int | None:
    number = _number(value) if value is not None else None
    return int(number) if isinstance(number, int | float) else None


def _resolve(path_or_url: str) -> str:
    root = os.environ.get("PHALANX_CHECKPOINT_DIR", "")
    if "://" in path_or_url or not root or path_or_url.startswith("/"):
        return path_or_url
    return f"{root.rstrip('/')}/{path_or_url}" if "://" in root else str(Path(root) / path_or_url)
