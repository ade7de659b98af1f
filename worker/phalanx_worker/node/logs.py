"""One output stream of one rank: read from its pipe, cut into chunks, bounded.

Owns the pace of reading (a rank that prints a little at a time costs a few wakeups a second, not one per line), the
chunks, the limit per rank, and the tail kept for the exit report. A chunk is at most 64 KiB and 200 ms old, and is cut
at a line end, so that the streams of many ranks read well when they are put together; what has no line end waits a
second for one. Sends nothing itself.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import Callable

MAX_CHUNK_BYTES = 64 * 1024
_READ_BYTES = 256 * 1024
_PIPE_MAX_BYTES = 1024 * 1024  # what an unprivileged process may make of a pipe's buffer
_CHUNK_AGE_S = 0.2
_PARTIAL_AGE_S = 1.0
_REST_S = 0.1  # between reads of a stream that trickles; the pipe's 64 KiB hold more than that brings
_BUSY_BYTES = 16 * 1024  # a read of at least this much is followed by the next at once

TAIL_BYTES = 2048

EmitChunk = Callable[[int, str, float], None]  # (offset, base64 data, at)


class LogBudget:
    """What the streams of one rank may still send together. `dropped_bytes` counts what came after."""

    def __init__(self, limit_bytes: int):
        self._left_bytes = limit_bytes
        self.dropped_bytes = 0

    def take(self, wanted_bytes: int) -> int:
        taken = min(wanted_bytes, self._left_bytes)
        self._left_bytes -= taken
        self.dropped_bytes += wanted_bytes - taken
        return taken


class LogStream:
    """Reads `fd` (which it owns) until its end; `ended` is set then."""

    def __init__(self, fd: int, budget: LogBudget, emit: EmitChunk):
        self.ended = asyncio.Event()
        self._fd = fd
        self._budget = budget
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._offset = 0
        self._waiting = bytearray()
        self._tail = bytearray()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._held_back = False  # what waits now has already waited for its line end
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    @property
    def tail(self) -> str:
        return bytes(self._tail).decode(errors="replace")

    def close(self) -> None:
        """Stop reading; what was read goes out."""
        if self.ended.is_set():
            return
        self.ended.set()
        self._send(len(self._waiting))
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def drain(self) -> None:
        """Read what the pipe holds now; not what somebody who still writes adds for as long as one reads."""
        read_bytes = 0
        while not self.ended.is_set() and read_bytes < _PIPE_MAX_BYTES and (count := self._take()):
            read_bytes += count

    def _read(self) -> None:
        count = self._take()
        if not self.ended.is_set() and count < _BUSY_BYTES:
            self._loop.remove_reader(self._fd)
            self._loop.call_later(_REST_S, self._resume)

    def _resume(self) -> None:
        if not self.ended.is_set():
            self._loop.add_reader(self._fd, self._read)

    def _take(self) -> int:
        """Read once; the number of bytes read."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if not data:
            self.close()
            return 0
        self._keep_tail(data)
        self._waiting += data[: self._budget.take(len(data))]
        if len(self._waiting) >= MAX_CHUNK_BYTES:
            self._send(self._lines_bytes() or len(self._waiting))
        elif self._waiting and (self._flush_timer is None or self._held_back):
            self._flush_after(_CHUNK_AGE_S - _REST_S)
        return len(data)

    def _keep_tail(self, data: bytes) -> None:
        self._tail += data[-TAIL_BYTES:]
        del self._tail[:-TAIL_BYTES]

    def _flush_after(self, delay_s: float) -> None:
        self._stop_timer()
        self._flush_timer = self._loop.call_later(delay_s, self._flush)

    def _stop_timer(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _flush(self) -> None:
        """Send whole lines; what is left over, only when it has waited before."""
        lines_bytes = self._lines_bytes()
        self._send(len(self._waiting) if self._held_back and not lines_bytes else lines_bytes)

    def _lines_bytes(self) -> int:
        """How much of what waits is whole lines; a carriage return ends one too, as progress bars have it."""
        return max(self._waiting.rfind(b"\n"), self._waiting.rfind(b"\r")) + 1

    def _send(self, count_bytes: int) -> None:
        self._stop_timer()
        at = time.time()
        for start in range(0, count_bytes, MAX_CHUNK_BYTES):
            chunk = self._waiting[start : min(start + MAX_CHUNK_BYTES, count_bytes)]
            self._emit(self._offset, base64.b64encode(chunk).decode(), at)
            self._offset += len(chunk)
        del self._waiting[:count_bytes]
        self._held_back = bool(self._waiting)
        if self._held_back:
            self._flush_after(_PARTIAL_AGE_S)


async def finish(streams: list[LogStream], timeout_s: float) -> None:
    """Wait for the end of every stream; one that somebody still holds open is closed after `timeout_s`."""
    for stream in streams:
        stream.drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(stream.ended.wait() for stream in streams))
    for stream in streams:
        stream.close()
