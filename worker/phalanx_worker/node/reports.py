"""One rank's report socket, seen from the runner: metrics and marks come in, "stop" and "profile" go out.

Owns the reading of the rank's datagrams, which are not trusted (a rank may send anything), and the bound on how many
points one rank may make: past it, points of the same 100 ms are merged, last value wins, and the loss is counted. Marks
are bounded too, but for signs of life, which go no further, and the word that the work is complete. What leaves here
can be sent: text that UTF-8 has no form for is replaced, and nothing nests deeply.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from phalanx_worker.protocol import Mark, MetricPoint
from phalanx_worker.runtime import channel

log = logging.getLogger("phalanx.node.reports")

MAX_MESSAGE_BYTES = 32 * 1024
MAX_NAME_LENGTH = 128
MAX_VALUES = 256  # of one point, merged or not
MAX_DEPTH = 20  # of what a mark carries, deeper parts are left out; the server reads no more than some 190
MARKS_OF_TRAINING = ("rendezvous", "first_step", "finished", "checkpoint", "progress")
MARK_KINDS = frozenset({*MARKS_OF_TRAINING, "dropped", "note", "health", "profile", "alive"})

_POINTS_PER_S = 100  # of one rank; what comes faster is merged
_BUCKET_S = 0.1
_READS_AT_ONCE = 256
_BURSTS_AT_ONCE = 2  # more than the socket holds
_BURSTS_AT_END = 16  # for whoever still writes
_REST_S = 0.1  # between bursts; the socket holds some 270 messages meanwhile
_MARKS_PER_MINUTE = 600
_DROPPED_EVERY_S = 10.0
_LARGEST = 1.7e308
_NOT_FINITE = frozenset({"nan", "inf", "-inf"})

Put = Callable[[MetricPoint | Mark], None]


class ReportSocket:
    """Owns the runner's end of the socket. `on_mark` sees each mark before it is put."""

    def __init__(
        self, connection: socket.socket, attempt: tuple[str, int], rank: int, put: Put, on_mark: Callable[[Mark], None]
    ):
        self._connection = connection
        self._attempt = attempt
        self._rank = rank
        self._put = put
        self._on_mark = on_mark
        self._loop = asyncio.get_running_loop()
        self._merged = Merger(self._put_point)
        self._marks_left = _MARKS_PER_MINUTE
        self._marks_since = time.monotonic()
        self._said_dropped_at = 0.0
        self._is_finished = False
        self._ended = False
        self._closed = False
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def tell_stop(self) -> None:
        self.tell({"t": "stop"})  # where it is not heard: SIGTERM says the same

    def tell(self, message: dict[str, Any]) -> bool:
        """Whether it could be sent: the socket may be full, or the rank gone."""
        if self._closed:
            return False
        try:
            channel.send(self._connection, message)
        except OSError:
            return False
        return True

    def drain(self, bursts: int = _BURSTS_AT_ONCE) -> None:
        """Take what is in the socket now, also while its reading rests."""
        for _ in range(bursts):
            if self._closed or self._ended or not self._take():
                break

    def close(self) -> None:
        """Take what is still in the socket, then close it."""
        if self._closed:
            return
        self.drain(_BURSTS_AT_END)
        self._closed = True
        self._loop.remove_reader(self._connection)
        self._connection.close()
        self._merged.flush()
        self._say_dropped()

    def _read(self) -> None:
        """A busy reporter is read in bursts, so that it costs the runner a bounded number of wakeups."""
        self._take()
        self._loop.remove_reader(self._connection)
        self._loop.call_later(_REST_S, self._resume)

    def _resume(self) -> None:
        if self._closed:
            return
        if not self._ended:
            self._loop.add_reader(self._connection, self._read)
        self._merged.flush_due(time.time())
        if self._merged.pending:
            self._loop.call_later(_BUCKET_S, self._merged.flush)
        if time.monotonic() - self._said_dropped_at > _DROPPED_EVERY_S:
            self._say_dropped()

    def _take(self) -> bool:
        """Read a burst; False when nothing was there."""
        for count in range(_READS_AT_ONCE):
            try:
                data = self._connection.recv(MAX_MESSAGE_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return count > 0
            except ConnectionResetError:  # it ended without reading our "stop"; what it sent comes after this error
                continue
            except OSError:
                data = b""
            if not data:
                self._ended = True
                return count > 0
            self._try(data)
        return True

    def _try(self, data: bytes) -> None:
        try:
            self._accept(data)
        except Exception:  # one datagram, whatever it is, must not cost those that follow
            log.exception("a datagram of rank %d of %s cannot be taken", self._rank, self._attempt[0])
            self._merged.dropped += 1

    def _accept(self, data: bytes) -> None:
        try:
            message = json.loads(data) if len(data) <= MAX_MESSAGE_BYTES else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._merged.dropped += 1
        elif message.get("t") == "metrics":
            self._accept_metrics(message)
        elif message.get("t") == "mark":
            self._accept_mark(message)

    def _accept_metrics(self, message: dict[str, Any]) -> None:
        given = message.get("values")
        given = given if isinstance(given, dict) else {}
        values = {_sendable(name): value for name, value in given.items() if _is_value(name, value)}
        values = dict(list(values.items())[:MAX_VALUES])
        self._merged.dropped += len(given) - len(values)
        step = _step(message.get("step"))
        if values or step is not None:
            self._merged.add(_moment(message.get("at")), step, values)

    def _accept_mark(self, message: dict[str, Any]) -> None:
        kind, given = message.get("kind"), message.get("data")
        if kind not in MARK_KINDS or not isinstance(given, dict) or not self._may_mark(kind):
            self._merged.dropped += 1
            return
        data = {name: value for name, value in given.items() if _is_flat(value)}
        self._merged.dropped += len(given) - len(data)
        at = _moment(message.get("at"))
        mark = Mark(*self._attempt, rank=self._rank, kind=kind, at=at, data=_sendable(data))
        self._on_mark(mark)
        if kind != "alive":  # which is for the node alone
            self._put(mark)

    def _may_mark(self, kind: str) -> bool:
        if kind == "alive" or (kind == "finished" and not self._is_finished):
            self._is_finished |= kind == "finished"
            return True
        now = time.monotonic()
        if now - self._marks_since > 60:
            self._marks_since, self._marks_left = now, _MARKS_PER_MINUTE
        self._marks_left -= 1
        return self._marks_left >= 0

    def _put_point(self, at: float, step: int | None, values: dict[str, float | str]) -> None:
        self._put(MetricPoint(*self._attempt, rank=self._rank, at=at, step=step, values=values))

    def _say_dropped(self) -> None:
        if self._merged.dropped:
            self._said_dropped_at = time.monotonic()
            data = {"what": "metrics", "count": self._merged.dropped, "bytes": 0}
            self._merged.dropped = 0
            self._put(Mark(*self._attempt, rank=self._rank, kind="dropped", at=time.time(), data=data))


class Merger:
    """Passes points on as they come, up to a number per second; after that keeps one point per 100 ms."""

    def __init__(self, emit: Callable[[float, int | None, dict[str, float | str]], None]):
        self.dropped = 0  # values that were overwritten or not understood
        self._emit = emit
        self._second = 0
        self._passed = 0
        self._bucket: float | None = None
        self._step: int | None = None
        self._values: dict[str, float | str] = {}
        self._at = 0.0

    @property
    def pending(self) -> bool:
        return self._bucket is not None

    def add(self, at: float, step: int | None, values: dict[str, float | str]) -> None:
        now = time.time()
        self.flush_due(now)
        if int(now) != self._second:
            self._second, self._passed = int(now), 0
        self._passed += 1
        if self._passed <= _POINTS_PER_S and self._bucket is None:
            self._emit(at, step, values)
            return
        known = self._values.keys() & values.keys()
        self.dropped += len(known)
        self._bucket = now if self._bucket is None else self._bucket
        self._step = step if step is not None else self._step
        self._at = at
        room = MAX_VALUES - len(self._values)
        new = [name for name in values if name not in known]
        self.dropped += len(new[room:])
        self._values |= {name: values[name] for name in [*known, *new[:room]]}

    def flush_due(self, now: float) -> None:
        if self._bucket is not None and now - self._bucket >= _BUCKET_S:
            self.flush()

    def flush(self) -> None:
        if self._bucket is not None:
            self._emit(self._at, self._step, self._values)
            self._bucket, self._step, self._values = None, None, {}


def _sendable(data: Any) -> Any:
    """The same without lone surrogates, which JSON can spell and UTF-8 cannot; `data` must be flat enough."""
    if isinstance(data, str):
        return data.encode(errors="replace").decode()
    if isinstance(data, dict):
        return {_sendable(key): _sendable(value) for key, value in data.items()}
    return [_sendable(value) for value in data] if isinstance(data, list) else data


def _is_flat(data: Any, depth: int = MAX_DEPTH - 1) -> bool:
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return all(depth > 1 and _is_flat(value, depth - 1) for value in inner if isinstance(value, dict | list))


def _is_value(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or isinstance(value, bool):
        return False
    if isinstance(value, str):
        return value in _NOT_FINITE
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _step(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 62) < value < 1 << 62:
        return value
    return None


def _moment(value: Any) -> float:
    """The rank's own time of the event, unless that is nonsense."""
    now = time.time()
    return float(value) if isinstance(value, int | float) and now - 86_400 < value < now + 86_400 else now
