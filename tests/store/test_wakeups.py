"""Wakeups reach who waits for their topic, after the commit and not before."""

import asyncio

import asyncpg
import pytest
from phalanx_server.store.engine import driver_dsn
from phalanx_server.store.wakeups import Wakeups, notify


@pytest.fixture
async def wakeups(database):
    async with Wakeups(database) as listener:
        await listener.wait_listening(10)
        yield listener


async def test_a_commit_wakes_its_topic_and_no_other(engine, wakeups):
    async with wakeups.subscribe("queue") as queue, wakeups.subscribe("node") as node:
        async with engine.begin() as conn:
            await notify(conn, "queue", "queue")
            assert not await queue.wait(0.05)
        assert await queue.wait(5)
        assert not await node.wait(0.01)
        assert not await queue.wait(0.01), "one wakeup wakes once"


async def test_a_wakeup_between_two_waits_is_not_lost(engine, wakeups):
    async with wakeups.subscribe("job:1", "job:2") as both:
        async with engine.begin() as conn:
            await notify(conn, "job:2")
        assert await both.wait(5)


async def test_a_lost_connection_is_made_again_and_everybody_looks(database, engine, wakeups):
    async with wakeups.subscribe("queue") as queue:
        other = await asyncpg.connect(driver_dsn(database))
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'phalanx-wakeups' AND datname = current_database()"
        )
        await other.close()
        assert await queue.wait(10), "what was notified in between is unknown, so all are woken"
        async with engine.begin() as conn:
            await notify(conn, "queue")
        assert await queue.wait(10)


async def test_closing_twice_and_without_a_database_is_fine():
    listener = Wakeups("postgresql://nobody@127.0.0.1:9/none")
    await listener.start()
    with pytest.raises(TimeoutError):
        await listener.wait_listening(0.05)
    await asyncio.gather(listener.close(), listener.close())
