"""Transactions that wait for each other: locks come in one order where they can, and else one of the two runs again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_array
from phalanx_server.actions.set_priority import set_priority
from phalanx_server.domain.access import SYSTEM
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_jobs
from phalanx_server.store.holds import HoldRow, delete_holds, upsert_holds
from phalanx_server.store.schema import audit, jobs
from phalanx_server.store.transactions import rerun_on_deadlock
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

WAITS_S = 10.0


async def somebody_waits(engine: AsyncEngine) -> None:
    """Until a transaction waits for a lock."""
    async with asyncio.timeout(WAITS_S), engine.connect() as conn:
        while not (await conn.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one():
            await conn.execute(text("SELECT pg_sleep(0.01)"))


async def in_a_circle(engine: AsyncEngine, first: UUID, second: UUID, work: Awaitable[object]) -> None:
    """Work that locks the first job and then the second, against a transaction that locks them the other way round and
    is not the one that is given up."""
    async with engine.begin() as conn:
        await conn.execute(text("SET LOCAL deadlock_timeout = '1min'"))
        await lock_jobs(conn, [second], held=())
        done = asyncio.ensure_future(work)
        await somebody_waits(engine)
        await lock_jobs(conn, [first], held=())
    await done


async def test_a_cancel_that_is_given_up_for_another_transaction_is_run_again(plane: ControlPlane) -> None:
    (one,) = (await plane.submit_file(name="many", array={"indices": "0-1"})).jobs
    assert one.array_id is not None
    async with plane.engine.connect() as conn:
        first, second = (await conn.execute(select(jobs.c.id).order_by(jobs.c.id))).scalars()
    cancel = cancel_array(plane.engine, one.array_id, actor=SYSTEM, now=plane.now)
    await in_a_circle(plane.engine, first, second, cancel)
    assert [await plane.state(job) for job in (first, second)] == ["cancelled"] * 2
    assert [row.action for row in await plane.rows(audit)].count("cancel_array") == 1


async def test_a_submit_that_is_given_up_for_an_end_is_run_again(plane: ControlPlane) -> None:
    first, second = await plane.submit(), await plane.submit()
    after = {"any": [ids.encode("job", job) for job in (first, second)]}
    await in_a_circle(plane.engine, first, second, plane.submit_file(name="last", after=after))
    (last,) = [row for row in await plane.rows(jobs) if row.name == "last"]
    assert last.unmet == 2


async def test_a_deadlock_is_told_when_it_comes_twice_and_nothing_else_is_run_again(engine: AsyncEngine) -> None:
    runs: list[str] = []

    @rerun_on_deadlock
    async def fails_with(state: str) -> None:
        runs.append(state)
        async with engine.begin() as conn:
            await conn.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"))

    for state, times in (("40P01", 2), ("23514", 1)):
        with pytest.raises(DBAPIError):
            await fails_with(state)
        assert runs.count(state) == times


async def upsert(conn: AsyncConnection, plane: ControlPlane, *job_ids: UUID) -> None:
    await upsert_holds(conn, [HoldRow(job, "capacity", "waits", (), None) for job in job_ids], now=plane.now)


async def delete(conn: AsyncConnection, plane: ControlPlane, *job_ids: UUID) -> None:
    await delete_holds(conn, list(job_ids))


@pytest.mark.parametrize("change", [upsert, delete])
async def test_holds_are_locked_in_the_order_of_their_jobs(
    plane: ControlPlane, change: Callable[..., Awaitable[None]]
) -> None:
    """A commit stores the holds of jobs whose array is being cancelled: each would have one that the other wants."""
    first, second = await plane.submit(), await plane.submit()
    await set_priority(plane.engine, first, 5, actor=SYSTEM, now=plane.now)  # its row lies behind the other's now
    async with plane.engine.begin() as conn:
        await upsert(conn, plane, second)
        await upsert(conn, plane, first)

    async def changing() -> None:
        async with plane.engine.begin() as conn:
            for scan in ("indexscan", "indexonlyscan", "bitmapscan"):  # rows come as they lie
                await conn.execute(text(f"SET LOCAL enable_{scan} = off"))
            await change(conn, plane, second, first)

    lock = "SELECT FROM holds WHERE job_id = $1 FOR UPDATE"
    async with plane.engine.begin() as holder, plane.engine.connect() as other:
        await holder.exec_driver_sql(lock, (second,))
        done = asyncio.create_task(changing())
        await somebody_waits(plane.engine)
        with pytest.raises(DBAPIError, match="could not obtain lock"):
            await other.exec_driver_sql(f"{lock} NOWAIT", (first,))
    await done
