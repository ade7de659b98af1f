"""What live passes expect of run times: learnt from the jobs that ended, told of those that wait and run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.requeue_job import requeue_job
from phalanx_server.domain.access import SYSTEM
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Job, Policy, Snapshot
from phalanx_server.store.calibration import calibrated_runs, calibrated_starts
from phalanx_server.store.forecasts import HISTORY_JOBS, NEWEST, load_history
from phalanx_server.store.schema import forecasts, holds
from phalanx_server.store.snapshots import load_snapshot, reading
from sqlalchemy import select, text

FIRST = ("first_start", "first_start_low", "first_start_high")


async def ran(plane: ControlPlane, run_s: float, **fields: object) -> UUID:
    """A job that ran so long and ended well."""
    job_id, attempt = await plane.run(**fields)  # type: ignore[arg-type]
    plane.later(run_s)
    await plane.report(plane.ended(attempt, 0))
    return job_id


def known(plane: ControlPlane) -> Snapshot:
    memory = plane.scheduler._memory
    assert memory is not None
    return memory.planner.snapshot()


def job_of(plane: ControlPlane, job_id: UUID) -> Job:
    return next(job for job in known(plane).jobs if job.id == job_id.hex)


async def agrees(plane: ControlPlane) -> bool:
    """The planner knows what a fresh load says, with what it was told of run times."""
    async with reading(plane.engine) as conn:
        snapshot, _ = await load_snapshot(conn, plane.now, Policy())
    told = plane.scheduler._memory.forecast.over(snapshot)  # type: ignore[union-attr]
    return {job.id: job for job in told.jobs} == {job.id: job for job in known(plane).jobs}


async def expected_start(plane: ControlPlane, job_id: UUID) -> float | None:
    async with plane.engine.connect() as conn:
        row = (await conn.execute(select(holds).where(holds.c.job_id == job_id))).one()
    return row.estimated_start and row.estimated_start.timestamp()


async def test_with_no_history_nothing_is_expected(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run(gpus=4, time_limit="1h")
    waiting = await plane.submit(gpus=4)
    await plane.tick()
    assert job_of(plane, job_id).predicted_s is None and job_of(plane, waiting).predicted_s is None


async def test_jobs_that_ended_tell_of_those_that_come(plane: ControlPlane) -> None:
    """And so who waits is told when to expect its start, without any time limit."""
    await plane.add_nodes(1)
    for _ in range(3):
        await ran(plane, 600, gpus=4)
    running, _ = await plane.run(gpus=4)
    began_at = plane.now.timestamp()
    plane.later(100)
    waiting = await plane.submit(gpus=4)
    await plane.tick()
    assert job_of(plane, running).predicted_s == job_of(plane, waiting).predicted_s == 600
    assert await expected_start(plane, waiting) == began_at + 600
    assert await agrees(plane)


async def test_a_new_leader_learns_what_the_old_one_knew(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    for _ in range(3):
        await ran(plane, 600, gpus=4)
    running, _ = await plane.run(gpus=4)
    await plane.tick()
    before = job_of(plane, running)
    plane.scheduler._memory = None
    await plane.tick()
    assert job_of(plane, running) == before
    assert await agrees(plane)


async def test_a_job_that_outlives_what_was_expected_is_expected_to_go_on(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    for _ in range(3):
        await ran(plane, 600, gpus=4)
    running, attempt = await plane.run(gpus=4)
    waiting = await plane.submit(gpus=4)
    starts: list[float] = []
    for _ in range(8):
        await plane.tick()
        assert await agrees(plane)
        at = await expected_start(plane, waiting)
        assert at is not None and at > plane.now.timestamp(), "whatever was outlived, an end is expected"
        starts.append(at)
        plane.later(400)
    assert starts == sorted(starts) and len(set(starts)) < len(starts), "not in every pass anew"
    await plane.report(plane.ended(attempt, 0))
    await plane.tick()
    assert await plane.state(waiting) == "starting"
    assert running.hex not in {job.id for job in known(plane).jobs}


async def test_what_was_learnt_reaches_those_that_wait_already(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run(gpus=4)
    waiting = await plane.submit(gpus=4, priority="low")
    await plane.tick()
    assert job_of(plane, waiting).predicted_s is None
    plane.later(300)
    await plane.report(plane.ended(attempt, 0))
    other = await plane.submit(gpus=4)
    await plane.tick()
    await plane.tick()
    assert job_of(plane, waiting).predicted_s == job_of(plane, other).predicted_s == 300
    assert await agrees(plane)


async def test_a_job_that_was_evicted_goes_on_where_it_was(plane: ControlPlane) -> None:
    """`done_s` counts: what is expected is the whole."""
    await plane.add_nodes(1)
    for _ in range(3):
        await ran(plane, 600, gpus=4)
    job_id, attempt = await plane.run(gpus=4)
    plane.later(200)
    urgent = await plane.submit(gpus=4, priority="high")
    await plane.tick()
    await plane.report(plane.ended(attempt, 143))
    await plane.tick()
    await plane.tick()
    job = job_of(plane, job_id)
    assert (job.state, job.done_s, job.predicted_s) == ("queued", 200, 600)
    assert await plane.state(urgent) == "starting"
    assert await agrees(plane)


async def test_the_history_is_bounded_and_in_order(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    for run_s in (10, 20, 30):
        await ran(plane, run_s, gpus=4, time_limit="1h")
    never = await plane.submit(gpus=4)
    async with plane.engine.connect() as conn:
        assert [each.run_s for each in await load_history(conn)] == [10, 20, 30]
        newest = await load_history(conn, most=2)
    assert [each.run_s for each in newest] == [20, 30] and never.hex not in {each.job for each in newest}
    assert (newest[0].work.gpus, newest[0].work.name, newest[0].work.time_limit_s) == (4, "job", 3600)
    assert HISTORY_JOBS > 128


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_run_counts_at_the_replicas_that_a_job_prefers(plane: ControlPlane, replicas: int) -> None:
    await plane.add_nodes(1, gpus=replicas)
    elastic = {"elastic": {"min_replicas": 1, "max_replicas": 2}}
    await ran(plane, 100, replicas=2, resources={"replicas": 2, "gpus_per_replica": 1, **elastic})
    async with plane.engine.connect() as conn:
        ((run_s,),) = [[each.run_s] for each in await load_history(conn)]
    assert run_s == (100 if replicas == 2 else pytest.approx(100 / 1.8))


async def test_an_expected_start_has_an_interval_and_is_compared_with_what_came(
    plane: ControlPlane,
) -> None:
    await plane.add_nodes(1)
    for run_s in range(100, 1300, 100):
        await ran(plane, run_s, gpus=4)
    _, attempt = await plane.run(gpus=4)
    began_at = plane.now.timestamp()
    second, third = await plane.submit(gpus=4), await plane.submit(gpus=4)
    plane.later(10)
    await plane.tick()
    rows = {row.job_id: row for row in await plane.rows(holds)}
    low, at, high = (
        getattr(rows[second], name).timestamp() - began_at
        for name in ("estimated_start_low", "estimated_start", "estimated_start_high")
    )
    assert (low, at, high) == (pytest.approx(210, abs=20), pytest.approx(650, abs=20), pytest.approx(1090, abs=20))
    widths = [
        (rows[job].estimated_start_high - rows[job].estimated_start_low).total_seconds() for job in (second, third)
    ]
    assert widths[1] > widths[0], "who waits for somebody that waits knows less"
    plane.later(690)
    await plane.report(plane.ended(attempt, 0))
    await plane.tick()
    assert await plane.state(second) == "starting"
    async with plane.engine.connect() as conn:
        starts, runs = await calibrated_starts(conn), await calibrated_runs(conn)
    assert (starts.jobs, starts.within_interval) == (1, 1.0)
    assert starts.median_error_s == pytest.approx(50, abs=20)
    said = {row.job_id: row for row in await plane.rows(forecasts)}
    assert said[attempt.job_id].run_s == 650 and said[second].run_s and said[third].run_s is None
    assert runs.jobs == 12 and runs.median_error_s is not None, "all that were expected to run for some time"
    told = plane.scheduler.starts
    assert (told.jobs, told.within) == (1, 1) and told.error_s == starts.median_error_s
    await plane.tick()
    assert plane.scheduler.runs.jobs == 12
    plane.scheduler._memory = None
    await plane.tick()
    await plane.tick()
    assert plane.scheduler.runs.jobs == 12, "a new leader knows as much"


async def test_what_was_first_said_of_a_start_outlives_the_scheduler_and_not_the_wait(
    plane: ControlPlane,
) -> None:
    """The next scheduler says something else by then: it is the first that is compared."""
    await plane.add_nodes(1)
    for run_s in range(100, 1300, 100):
        await ran(plane, run_s, gpus=4)
    _, attempt = await plane.run(gpus=4)
    began_at = plane.now
    waiting = await plane.submit(gpus=4)
    plane.later(10)
    await plane.tick()
    (told,) = await plane.rows(holds)
    plane.later(990)  # longer than was expected
    plane.scheduler = ScheduleLoop(plane.engine, plane.leader, policy=plane.policy)
    await plane.tick()
    await plane.tick()
    (again,) = await plane.rows(holds)
    assert again.estimated_start > told.estimated_start == told.first_start
    assert [getattr(again, name) for name in FIRST] == [getattr(told, name) for name in FIRST]
    plane.later(10)
    await plane.report(plane.ended(attempt, 0))
    await plane.tick()
    assert await plane.state(waiting) == "starting"
    record, error_s = plane.scheduler.starts, (plane.now - told.first_start).total_seconds()
    assert (record.jobs, record.error_s) == (1, error_s) and error_s == pytest.approx(360, abs=20)
    async with plane.engine.connect() as conn:
        assert (await calibrated_starts(conn)).median_error_s == error_s
    assert (plane.now - began_at).total_seconds() == 1010

    await plane.start(waiting)
    await requeue_job(plane.engine, waiting, actor=SYSTEM, now=plane.now)
    await plane.submit(gpus=4, priority="high")
    await plane.report(plane.ended(await plane.attempt(waiting), 0))
    await plane.tick()
    plane.later(10)
    await plane.tick()
    (next_wait,) = await plane.rows(holds)
    assert next_wait.job_id == waiting and next_wait.first_start > plane.now, "another wait has another first"


async def test_after_a_mass_cancel_the_history_is_found_without_looking_at_it(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await ran(plane, 10, gpus=4)
    async with plane.engine.begin() as conn:
        await conn.execute(text(MANY_CANCELLED), {"id": job_id, "at": plane.now})
    async with plane.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        await conn.execute(text("ANALYZE"))
    async with plane.engine.connect() as conn:
        query = text("EXPLAIN (ANALYZE, FORMAT JSON) " + NEWEST)
        (plan,) = (await conn.execute(query, {"most": HISTORY_JOBS})).scalar_one()
        assert [each.run_s for each in await load_history(conn)] == [10]
    assert looked_at_in_vain(plan["Plan"]) == 0


MANY_CANCELLED = """
    INSERT INTO jobs (id, tenant_id, name, state, spec, created_by, received_at, submitted_at, queued_at, finished_at)
    SELECT gen_random_uuid(), j.tenant_id, 'given-up', 'cancelled', '{}', 'ann', :at, :at, :at, :at
    FROM jobs j, generate_series(1, 20000) WHERE j.id = :id
"""


def looked_at_in_vain(plan: dict[str, Any]) -> int:
    return plan.get("Rows Removed by Filter", 0) + sum(map(looked_at_in_vain, plan.get("Plans", ())))


async def test_a_time_that_is_sure_is_an_interval_of_no_width(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job = await plane.submit(not_before=(plane.now + timedelta(seconds=60)).isoformat())
    await plane.tick()
    (row,) = await plane.rows(holds)
    assert row.job_id == job
    assert row.estimated_start_low == row.estimated_start == row.estimated_start_high


async def test_where_nothing_tells_there_is_no_interval(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.run(gpus=4)
    await plane.submit(gpus=4)
    await plane.tick()
    (row,) = await plane.rows(holds)
    assert (row.estimated_start, row.estimated_start_low, row.estimated_start_high) == (None, None, None)
    assert await plane.rows(forecasts) == []


async def test_a_pass_tells_a_bounded_number_anew_and_the_next_ones_the_others(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx_server.store.forecasts.RETOLD_MAX", 2)
    await plane.add_nodes(1)
    _, attempt = await plane.run(gpus=4)
    waiting = [await plane.submit(gpus=4, held=True) for _ in range(5)]
    await plane.tick()
    plane.later(300)
    await plane.report(plane.ended(attempt, 0))
    told = []
    for _ in range(3):
        await plane.tick()
        told.append(sum(job_of(plane, job).predicted_s == 300 for job in waiting))
        assert await agrees(plane)
    assert told == [2, 4, 5]
