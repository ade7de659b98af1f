"""The runner's side of the warm process: started, watched, started again, asked to fork guardians.

Owns the process and its socket. After repeated deaths while loading it is started without torch, so that commands which
do not need it still run; torch is tried again whenever nothing was forked for a while. A group, once forked, does not
depend on it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.units import duration_text

from phalanx_worker.node.orders import StartFailed
from phalanx_worker.runtime import channel

log = logging.getLogger("phalanx.node.warm")

READY_TIMEOUT_S = 120.0
_BACKOFF_S = (0.1, 10.0)
_MOST_DOUBLINGS = 8
_DEATHS_BEFORE_NO_TORCH = 3
_WITHOUT_TORCH_S = (120.0, 3_600.0)  # until torch is tried again, doubled each time that it fails


@dataclass(frozen=True)
class WarmState:
    """What the warm process said of itself. `unfit`: why no rank can be forked from it; "" if it can."""

    pid: int
    python: str  # its version, as "3.11"
    torch: str
    unfit: str
    loaded: frozenset[str] = frozenset()  # modules that are not Python's own


class WarmProcess:
    """`env` must be scrubbed already: ranks inherit its memory. One that is to be `light` never has torch: forks of it
    cost a tenth, and serve for programs that are executed."""

    def __init__(self, *, python: str, env: Mapping[str, str], log_path: Path, light: bool = False):
        self._python = python
        self._env = dict(env)
        self._log_path = log_path
        self._light = light
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._state: asyncio.Future[WarmState] = asyncio.get_running_loop().create_future()
        self._deaths = 0
        self._tries_again = 0  # with torch, after it was given up
        self._forked_at = 0.0
        self._keeper: asyncio.Task[None] | None = None

    def start(self, *, on_ready: Callable[[], None]) -> None:
        self._keeper = asyncio.create_task(self._keep(on_ready))

    @property
    def state(self) -> WarmState | None:
        """None while it is loading."""
        return self._state.result() if self._state.done() and not self._state.cancelled() else None

    async def ready(self) -> WarmState:
        """Wait until it can fork. Raises StartFailed when that takes too long."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await asyncio.shield(self._state)
        except TimeoutError:
            raise StartFailed(f"the warm process was not ready in {duration_text(READY_TIMEOUT_S)}") from None

    async def fork_guardian(self, guardian_socket: socket.socket, fds: list[int]) -> None:
        """Have it fork a guardian that talks through `guardian_socket`. Raises StartFailed when it is gone."""
        await self.ready()
        try:
            assert self._connection is not None
            self._forked_at = time.monotonic()
            channel.send(self._connection, {"op": "group"}, [guardian_socket.fileno(), *fds])
        except OSError as error:
            raise StartFailed(f"the warm process cannot be reached: {error}") from error

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._hang_up()

    # -------------------------------------------------------------- keeping it alive

    async def _keep(self, on_ready: Callable[[], None]) -> None:
        while True:
            try:
                await self._live(on_ready)
            except OSError as error:
                log.error("the warm process cannot be started: %s", error)
            self._hang_up()
            self._deaths += 1
            first, longest = _BACKOFF_S
            await asyncio.sleep(min(longest, first * 2 ** min(self._deaths, _MOST_DOUBLINGS)))

    async def _live(self, on_ready: Callable[[], None]) -> None:
        """One life: start, wait for "ready", then until its socket closes."""
        with_torch = not self._light and self._deaths < _DEATHS_BEFORE_NO_TORCH
        self._spawn(with_torch=with_torch)
        assert self._connection is not None
        received = await self._loaded(self._connection)
        if received is None:
            log.error("the warm process died or hung while loading; see %s", self._log_path)
            return
        said = [received[name] for name in ("pid", "python", "torch", "unfit")]
        self._state.set_result(WarmState(*said, loaded=frozenset(received["loaded"])))
        on_ready()
        if with_torch or self._light:
            self._deaths = self._tries_again = 0
            await self._receive(self._connection)
        else:
            await self._without_torch(self._connection)
        log.error("the warm process ended; see %s", self._log_path)
        self._state = asyncio.get_running_loop().create_future()

    async def _loaded(self, connection: socket.socket) -> dict[str, Any] | None:
        """What it says when it can fork; None if it ended, or hangs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_TIMEOUT_S):  # `wait_for` may lose a cancel that comes with the message
                return await self._receive(connection)
        return None

    async def _without_torch(self, connection: socket.socket) -> None:
        """Until it ends, or torch is worth another try: nothing was forked meanwhile, and who waits then waits long."""
        first, longest = _WITHOUT_TORCH_S
        idle_s = min(longest, first * 2 ** min(self._tries_again, _MOST_DOUBLINGS))
        end = asyncio.ensure_future(self._receive(connection))
        since = time.monotonic()
        try:
            while not end.done() and (left_s := max(since, self._forked_at) + idle_s - time.monotonic()) > 0:
                await asyncio.wait([end], timeout=left_s)
            if not end.done():
                self._tries_again += 1
                self._deaths = _DEATHS_BEFORE_NO_TORCH - 2  # this end counts as well: then there is one life to try
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)

    def _spawn(self, *, with_torch: bool) -> None:
        ours, theirs = channel.pair()
        theirs.set_inheritable(True)
        arguments = ["--fd", str(theirs.fileno())]
        if not with_torch:
            arguments.append("--no-torch")
        with open(self._log_path, "ab") as output, theirs:
            self._process = subprocess.Popen(
                [self._python, "-m", "phalanx_worker.runtime.boot", "warm", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=self._env,
                cwd=os.sep,
                start_new_session=True,
            )
        ours.setblocking(False)
        self._connection = ours

    @staticmethod
    async def _receive(connection: socket.socket) -> dict[str, Any] | None:
        data = await asyncio.get_running_loop().sock_recv(connection, 65536)
        return channel.parse(data) if data else None

    def _hang_up(self) -> None:
        """It ends by itself when its socket closes; if it is stuck in an import it is killed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
