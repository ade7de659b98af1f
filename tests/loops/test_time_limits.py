"""Time limits: of all attempts together, enforced when the pass expects it."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.actions.set_policy import set_policy
from phalanx_server.domain.access import SYSTEM
from phalanx_server.loops.enforce import Enforce
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.schema import events, holds
from phalanx_server.store.time_limits import overdue_attempts
from sqlalchemy import Row, event, text
from sqlalchemy.ext.asyncio import AsyncConnection


async def test_a_job_over_its_limit_is_asked_to_end(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    enforce = Enforce(plane.engine, plane.leader, policy=plane.policy)
    limited, attempt = await plane.run(time_limit="10m")
    free, _ = await plane.run()
    plane.later(599)
    assert await enforce.tick(plane.now) == []
    plane.later(1)
    assert await enforce.tick(plane.now) == [limited]
    assert await enforce.tick(plane.now) == []
    assert (await plane.attempt(limited)).stop_cause == "time_limit"
    assert (await plane.state(limited), await plane.state(free)) == ("stopping", "running")
    await plane.report(plane.ended(attempt, 143))
    job = await plane.job(limited)
    assert (job.state, job.reason) == ("failed", "time_limit")


async def test_the_limit_of_one_attempt_never_ends_the_next(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt that ran for too long fails by itself, and its job starts again, between two statements."""
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(time_limit="10m", retries={"max": 1, "backoff": 0})
    plane.later(600)

    async def overdue(conn: AsyncConnection, **values: Any) -> list[UUID]:
        found = await overdue_attempts(conn, **values)
        await plane.report(plane.ended(attempt, 1, at=plane.now.timestamp() - 1))
        await plane.tick()
        return found

    monkeypatch.setattr("phalanx_server.actions.enforce_limits.overdue_attempts", overdue)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == []
    assert await plane.state(job_id) == "starting"


async def test_a_deposed_leader_ends_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run(time_limit="10m")
    plane.later(600)
    await plane.depose()
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == []
    assert await plane.state(job_id) == "running"


async def test_time_spent_waiting_is_not_limited(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit(time_limit=10)
    plane.later(100)
    await plane.tick()
    plane.later(100)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == []
    await plane.start(job_id)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == []


# ------------------------------------------------------------------ over several attempts


async def evict(plane: ControlPlane, attempt: Row[Any], *, grace_s: float = 0.0) -> Row[Any]:
    """Let an urgent job evict the one that holds all GPUs, which takes so long to stop; the urgent job's attempt."""
    urgent = await plane.submit(gpus=4, priority="urgent", preemption={"preemptible": False})
    await plane.tick()
    assert (await plane.attempt(attempt.job_id)).stop_cause == "preemption"
    plane.later(grace_s)
    await plane.report(plane.ended(attempt, 143))
    await plane.tick()
    return await plane.start(urgent)


async def end_expected_by_a_waiting_job(plane: ControlPlane) -> float:
    """When the pass expects the running job to end: the expected start of one that waits for it."""
    waiting = await plane.submit(gpus=4)
    await plane.tick()
    row = next(row for row in await plane.rows(holds) if row.job_id == waiting)
    assert row.estimated_start is not None
    return row.estimated_start.timestamp()


async def test_what_preempted_attempts_ran_counts_and_the_job_ends_when_the_pass_expects(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    enforce = Enforce(plane.engine, plane.leader, policy=plane.policy)
    job_id, attempt = await plane.run(gpus=4, time_limit="10m")
    plane.later(390)
    urgent = await evict(plane, attempt, grace_s=10)
    plane.later(5000)
    assert await enforce.tick(plane.now) == [], "waiting counts for nothing"
    await plane.report(plane.ended(urgent, 0))
    await plane.tick()
    second = await plane.start(job_id)
    expected = await end_expected_by_a_waiting_job(plane)
    assert expected == plane.now.timestamp() + 200, "ten minutes less the 400 s of the first attempt, its grace counted"
    plane.later(199)
    assert await enforce.tick(plane.now) == []
    plane.later(1)
    assert (await enforce.tick(plane.now), plane.now.timestamp()) == ([job_id], expected)
    await plane.report(plane.ended(second, 143))
    job = await plane.job(job_id)
    assert (job.state, job.reason, job.attempts) == ("failed", "time_limit", 2)


async def test_failed_attempts_count_as_well(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(gpus=4, time_limit="10m", retries={"max": 3, "backoff": 0})
    plane.later(400)
    await plane.report(plane.ended(attempt, 1))
    await plane.tick()
    await plane.start(job_id)
    plane.later(200)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == [job_id]


async def test_earlier_attempts_are_looked_up_only_of_jobs_that_have_some(plane: ControlPlane) -> None:
    """Every second, of all that runs."""
    await plane.add_nodes(1)
    _, attempt = await plane.run(gpus=4, time_limit="10m", retries={"max": 3, "backoff": 0})
    assert set(await looked_up(plane)) <= {"(never executed)"}
    await plane.report(plane.ended(attempt, 1))
    await plane.tick()
    await plane.start(attempt.job_id)
    assert "(never executed)" not in await looked_up(plane)


async def looked_up(plane: ControlPlane) -> list[str]:
    """How often the attempts that are over were, as PostgreSQL explains what the loop asks it."""

    def explain(*args: Any) -> tuple[str, Any]:
        return f"EXPLAIN (ANALYZE, TIMING off, COSTS off) {args[2]}", args[3]

    async with plane.engine.connect() as conn:
        event.listen(plane.engine.sync_engine, "before_cursor_execute", explain, retval=True)
        lines = [str(line) for line in await overdue_attempts(conn, default_s=None, now=plane.now)]
        event.remove(plane.engine.sync_engine, "before_cursor_execute", explain)
    found = [re.search(r"attempts past.*?(\(never executed\)|\(actual.*)", line) for line in lines]
    return [match[1] for match in found if match]


async def test_an_attempt_that_never_ran_costs_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit(gpus=4, time_limit="10m", retries={"max": 3, "backoff": 0})
    await plane.tick()
    plane.later(400)
    await plane.report(plane.fact(await plane.attempt(job_id), "start_failed", message="no"))
    await plane.tick()
    await plane.start(job_id)
    plane.later(599)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == []


async def test_a_job_that_reaches_its_limit_while_it_gives_way_is_not_queued_again(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(gpus=4, time_limit="10m")
    waits = (await plane.submit_file(after={"ok": [f"job_{job_id.hex}"]})).jobs[0].id
    plane.later(595)
    await evict(plane, attempt, grace_s=30)
    job, first = await plane.job(job_id), await plane.attempt(job_id)
    assert (job.state, job.reason, first.outcome) == ("failed", "time_limit", "preempted")
    assert "nothing is left of its time limit" in job.message and job.finished_at is not None
    assert await plane.state(waits) == "cancelled", "who waits for it hears of it"


async def test_a_lost_job_without_time_left_is_not_started_again(plane: ControlPlane) -> None:
    (node,) = await plane.add_nodes(1)
    job_id, _ = await plane.run(gpus=4, time_limit="10m")
    plane.later(600)
    await plane.lose(node)
    job = await plane.job(job_id)
    assert (job.state, job.reason) == ("failed", "time_limit")


# ------------------------------------------------------------------ the policy's default


async def test_the_default_limit_of_the_policy_ends_jobs_that_name_none(plane: ControlPlane) -> None:
    """The pass counts on it: it fits such a job in before a reservation or a maintenance window."""
    await plane.add_nodes(2)
    enforce = Enforce(plane.engine, plane.leader, policy=Policy(default_time_limit_s=600))
    plain, _ = await plane.run(gpus=4)
    own, _ = await plane.run(gpus=4, time_limit="1h")
    plane.later(600)
    assert await enforce.tick(plane.now) == [plain]
    await set_policy(plane.engine, {"default_time_limit_s": None}, base=Policy(), if_version=None, actor=SYSTEM)
    plane.later(2999)
    assert await enforce.tick(plane.now) == [], "what is set goes over the settings file"
    plane.later(1)
    assert await enforce.tick(plane.now) == [own]


async def test_a_job_that_gives_way_at_the_default_limit_does_not_start_once_more(plane: ControlPlane) -> None:
    """It is queued, since an end knows no policy: a pass may come before the loop that fails it."""
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(gpus=4)
    settings = {"default_time_limit_s": 400}
    await set_policy(plane.engine, settings, base=plane.policy, if_version=None, actor=SYSTEM)
    plane.later(400)
    urgent = await evict(plane, attempt)
    await plane.report(plane.ended(urgent, 0))
    await plane.tick()
    await plane.tick()
    assert ((await plane.job(job_id)).attempts, await plane.state(job_id)) == (1, "queued")
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == [job_id]


async def test_a_waiting_job_that_has_used_up_a_new_default_fails(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    enforce = Enforce(plane.engine, plane.leader, policy=Policy())
    job_id, attempt = await plane.run(gpus=4)
    fresh = await plane.submit(gpus=4)
    plane.later(400)
    await evict(plane, attempt)
    assert await enforce.tick(plane.now) == []
    await set_policy(plane.engine, {"default_time_limit_s": 400}, base=Policy(), if_version=None, actor=SYSTEM)
    assert await enforce.tick(plane.now) == [job_id]
    assert await enforce.tick(plane.now) == []
    job = await plane.job(job_id)
    assert (job.state, job.reason, job.finished_at) == ("failed", "time_limit", plane.now)
    assert await plane.state(fresh) == "queued", "what has not run yet has all of its time"
    kinds = {row.kind for row in await plane.rows(events) if row.job_id == job_id}
    assert "failed" in kinds and job_id not in {row.job_id for row in await plane.rows(holds)}
    await plane.tick()
    assert job_id.hex not in await plane.known_jobs()


async def test_a_deadlock_while_attempts_are_stopped_does_not_undo_what_else_was_told(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that wait fail in a transaction of their own, which is not run again for the sake of the other."""
    await plane.add_nodes(1)
    waits, attempt = await plane.run(gpus=4)
    plane.later(400)
    urgent = (await evict(plane, attempt)).job_id
    plane.later(400)
    await set_policy(plane.engine, {"default_time_limit_s": 400}, base=plane.policy, if_version=None, actor=SYSTEM)
    tries: list[int] = []

    async def stop(conn: AsyncConnection, *args: Any, **values: Any) -> list[UUID]:
        tries.append(len(tries))
        if len(tries) == 1:
            await conn.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40P01'; END $$"))
        return await request_stop(conn, *args, **values)

    monkeypatch.setattr("phalanx_server.actions.enforce_limits.request_stop", stop)
    assert await Enforce(plane.engine, plane.leader, policy=plane.policy).tick(plane.now) == [waits, urgent]
    assert (await plane.state(waits), await plane.state(urgent), len(tries)) == ("failed", "stopping", 2)
