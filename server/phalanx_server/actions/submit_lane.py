"""A lane of submits: what waits for a transaction, and the tasks that carry it out, as much at once as fits one.

Owns the queue and its bounds: how many jobs share a transaction, and how many transactions run at once. Refuses to know
what a submit is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from phalanx_server.domain.errors import Unavailable


class Waiting(Protocol):
    """Something that waits for a transaction; of two with one `key` each transaction takes one."""

    @property
    def size_jobs(self) -> int: ...
    @property
    def key(self) -> tuple[str, str] | None: ...
    def fail(self, error: BaseException) -> None: ...


W = TypeVar("W", bound=Waiting)


class Lane(Generic[W]):
    """`flush` carries out, and answers, what it is given. Together that is at most `most_jobs`, or one alone."""

    def __init__(self, flush: Callable[[Sequence[W]], Awaitable[None]], *, most_jobs: int, at_once: int = 1) -> None:
        self._flush = flush
        self._most_jobs = most_jobs
        self._at_once = at_once
        self._waiting: deque[W] = deque()
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.waiting_jobs = 0
        """Jobs that no transaction has taken up yet."""

    def start(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._flush_forever(), name="submits") for _ in range(self._at_once)]

    async def close(self) -> None:
        """Stop; what was not flushed is refused as unavailable."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        _fail_all(self._waiting, Unavailable("the submit was not carried out; try again"))
        self._waiting.clear()
        self.waiting_jobs = 0

    def put(self, waiting: W) -> None:
        self._waiting.append(waiting)
        self.waiting_jobs += waiting.size_jobs
        self._arrived.set()

    async def _flush_forever(self) -> None:
        while True:
            await self._arrived.wait()
            taken = self._take()
            if not taken:  # another task was quicker
                continue
            try:
                await self._flush(taken)
            except asyncio.CancelledError:
                _fail_all(taken, Unavailable("the server is stopping; try again shortly"))
                raise
            except Exception as error:  # the lane outlives whatever a flush meets: each submit is told what it was
                _fail_all(taken, error)

    def _take(self) -> list[W]:
        """What the next flush carries: as much as fits, each idempotency key once."""
        taken: list[W] = []
        put_back: list[W] = []
        keys: set[tuple[str, str]] = set()
        jobs = 0
        while self._waiting and (not taken or jobs + self._waiting[0].size_jobs <= self._most_jobs):
            waiting = self._waiting.popleft()
            if waiting.key in keys:
                put_back.append(waiting)
                continue
            keys |= {waiting.key} if waiting.key else set()
            jobs += waiting.size_jobs
            taken.append(waiting)
        self.waiting_jobs -= jobs
        self._waiting.extendleft(reversed(put_back))
        if not self._waiting:
            self._arrived.clear()
        return taken


def _fail_all(waiting: Sequence[W], error: BaseException) -> None:
    for each in waiting:
        each.fail(error)
