"""Wakeups: NOTIFY and LISTEN on one channel, as hints that something changed.

Owns the one listening connection of a process and who waits for which topic. A hint may be lost or come twice: every
waiter also looks by itself at an interval. Topics: `queue`, `node`, `desired:<cluster>`, `job:<job>`, `logs:<job>`,
`metrics:<job>`, with ids as 32 hex digits.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import CONNECT_TIMEOUT_S, driver_dsn

CHANNEL = "phalanx"
RECONNECT_S = (0.05, 0.2, 1.0, 2.0)
PROBE_S = 15.0

_NOTIFY = text("SELECT pg_notify(:channel, topic) FROM unnest(CAST(:topics AS text[])) AS topic").bindparams(
    channel=CHANNEL
)


async def notify(conn: AsyncConnection, *topics: str) -> None:
    """Wake the waiters of `topics` when the transaction of `conn` commits."""
    if topics:
        await conn.execute(_NOTIFY, {"topics": sorted(set(topics))})


class Subscription:
    """What one waiter of some topics holds. A wakeup that comes between two waits is not lost."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a wakeup, at most `timeout_s`. True if there was one since the last wait."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True

    def wake(self) -> None:
        self._event.set()


class Wakeups:
    """The listener of a process. `start()` returns at once; while the database is away, waiters just time out."""

    def __init__(self, url: str) -> None:
        self._dsn = driver_dsn(url)
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def subscriptions(self) -> int:
        """Waiters, each once for each of its topics."""
        return sum(map(len, self._subscriptions.values()))

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._listen_forever(), name="wakeups")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def __aenter__(self) -> "Wakeups":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def wait_listening(self, timeout_s: float) -> None:
        """Wait until LISTEN is in force. TimeoutError if it is not after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            await self._listening.wait()

    @contextlib.asynccontextmanager
    async def subscribe(self, *topics: str) -> AsyncIterator[Subscription]:
        """A subscription to `topics` for the length of the block."""
        subscription = Subscription()
        for topic in topics:
            self._subscriptions.setdefault(topic, set()).add(subscription)
        try:
            yield subscription
        finally:
            for topic in topics:
                waiting = self._subscriptions[topic]
                waiting.discard(subscription)
                if not waiting:
                    del self._subscriptions[topic]

    async def _listen_forever(self) -> None:
        failures = 0
        while True:
            try:
                await self._listen_until_lost()
                failures = 0
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                failures += 1
            self._listening.clear()
            await asyncio.sleep(RECONNECT_S[min(failures, len(RECONNECT_S) - 1)])

    async def _listen_until_lost(self) -> None:
        lost = asyncio.Event()
        connection = await asyncpg.connect(
            self._dsn, timeout=CONNECT_TIMEOUT_S, server_settings={"application_name": "phalanx-wakeups"}
        )
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, self._on_notify)
            self._listening.set()
            self._wake_all()  # what was notified while nobody listened is unknown
            await _until_lost(connection, lost)
        finally:
            connection.terminate()

    def _on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        for subscription in self._subscriptions.get(str(payload), ()):
            subscription.wake()

    def _wake_all(self) -> None:
        for waiting in self._subscriptions.values():
            for subscription in waiting:
                subscription.wake()


async def _until_lost(connection: asyncpg.Connection, lost: asyncio.Event) -> None:
    """Return when `connection` is gone; a probe now and then finds a peer that vanished without a word."""
    while not lost.is_set():
        try:
            async with asyncio.timeout(PROBE_S):
                await lost.wait()
        except TimeoutError:
            await connection.execute("SELECT 1", timeout=PROBE_S)
