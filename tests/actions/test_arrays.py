"""Arrays: many jobs of one submit, each with its index; steered together, started only so many at once."""

from __future__ import annotations

import asyncio
import hashlib
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_array
from phalanx_server.actions.hold_job import hold_array, release_array
from phalanx_server.actions.idempotency import Idempotency
from phalanx_server.actions.requeue_job import requeue_array, requeue_job
from phalanx_server.actions.set_priority import set_array_priority, set_priority
from phalanx_server.actions.submit_jobs import Submission, Submitter
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict, Invalid, NotFound
from phalanx_server.domain.spec import parse_job
from phalanx_server.scheduling.snapshot import ArrayLimit
from phalanx_server.store import ids
from phalanx_server.store.array_views import load_array
from phalanx_server.store.job_views import JobFilter, list_jobs, load_jobs
from phalanx_server.store.schema import audit, events, jobs
from sqlalchemy import Row, select

DOCUMENT = {"name": "sweep", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}}


async def submit(plane: ControlPlane, indices: str, *, max_running: int | None = None, **fields: object) -> UUID:
    array = {"indices": indices, "max_running": max_running}
    accepted = await plane.submit_file(**DOCUMENT | fields | {"array": array})
    assert accepted.jobs[0].array_id is not None
    return accepted.jobs[0].array_id


async def members(plane: ControlPlane, array_id: UUID) -> list[Row]:
    query = select(jobs).where(jobs.c.array_id == array_id).order_by(jobs.c.array_index)
    async with plane.engine.connect() as conn:
        return list(await conn.execute(query))


async def states(plane: ControlPlane, array_id: UUID) -> dict[str, int]:
    async with plane.engine.connect() as conn:
        row = await load_array(conn, array_id)
    assert row is not None
    return dict(row.states)


async def test_one_submit_makes_a_job_of_each_index(plane: ControlPlane) -> None:
    (first,) = (await plane.submit_file(**DOCUMENT, array={"indices": "7-9,0,3", "max_running": 2}, held=True)).jobs
    made = await members(plane, first.array_id)
    assert [(row.name, row.array_index) for row in made] == [(f"sweep[{i}]", i) for i in (0, 3, 7, 8, 9)]
    assert [row.id for row in made] == sorted(row.id for row in made), "the queue takes them by index"
    assert {row.array_max_running for row in made} == {2} and all(row.held for row in made)
    assert {row.spec["name"] for row in made} == {"sweep"}
    async with plane.engine.connect() as conn:
        (shown,) = await load_jobs(conn, [first.id])
        listed = await list_jobs(conn, JobFilter(array=first.array_id), before=None, limit=10)
    assert {name: getattr(first, name) for name in shown._fields} == dict(shown._mapping)
    assert [row.id for row in listed] == [row.id for row in reversed(made)]
    told = [(row.kind, row.message) for row in await plane.rows(events) if row.job_id]
    name = ids.encode("array", first.array_id)
    assert told == [("submitted", f"Submitted by phalanx in {name}, on hold.")] * 5
    (entry,) = [row for row in await plane.rows(audit) if row.action == "submit_jobs"]
    assert entry.detail["jobs"] == 5


async def test_ten_thousand_are_accepted_at_once_and_no_more(plane: ControlPlane) -> None:
    array_id = await submit(plane, "0-9999")
    assert await states(plane, array_id) == {"queued": 10_000}
    submitter = Submitter(plane.engine)
    await submitter.start()
    halves = [parse_job(DOCUMENT | {"array": {"indices": each}}) for each in ("0-4999", "0-5000")]
    with pytest.raises(Invalid, match="10001 jobs with those of arrays, at most 10000"):
        await submitter.submit(Submission(specs=halves, actor=SYSTEM, received_at=plane.now, batch=True))
    await submitter.close()


async def test_the_same_key_makes_one_array(plane: ControlPlane) -> None:
    submitter = Submitter(plane.engine)
    await submitter.start()
    submission = Submission(
        specs=[parse_job(DOCUMENT | {"array": {"indices": "0-9"}})],
        actor=SYSTEM,
        received_at=plane.now,
        idempotency=Idempotency("ann", "key", hashlib.sha256(b"").digest()),
        render=lambda made: {"array": str(made[0].array_id)},
    )
    answers = await asyncio.gather(*(submitter.submit(submission) for _ in range(4)))
    await submitter.close()
    assert len({answer.response["array"] for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False, True, True, True]
    assert len(await plane.rows(jobs)) == 10


async def test_no_more_run_at_once_than_its_limit(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=4)
    array_id = await submit(plane, "0-4", max_running=2)
    for done in range(0, 4, 2):
        await plane.tick()
        assert await states(plane, array_id) == {"queued": 3 - done, "starting": 2} | (
            {"succeeded": done} if done else {}
        )
        for row in (await members(plane, array_id))[done : done + 2]:
            await plane.start(row.id)
        await plane.tick()
        assert (await states(plane, array_id))["queued"] == 3 - done, "those that run count"
        for row in (await members(plane, array_id))[done : done + 2]:
            await plane.report(plane.ended(await plane.attempt(row.id), 0))
    await plane.tick()
    assert await states(plane, array_id) == {"starting": 1, "succeeded": 4}


async def test_the_snapshot_names_the_array_of_all_that_wait_run_and_stop(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=2)
    array_id = await submit(plane, "0-2", max_running=2)
    await plane.tick()
    one, two, _ = await members(plane, array_id)
    await plane.start(one.id)
    await plane.start(two.id)
    await requeue_job(plane.engine, two.id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    known = (await plane.known_jobs()).values()
    assert {job.state for job in known} == {"running", "stopping", "queued"}
    assert {job.array for job in known} == {ArrayLimit(id=array_id.hex, max_running=2)}


async def test_ranks_are_told_the_array_and_their_index(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    array_id = await submit(plane, "2-8:3", run={"command": "true", "env": {"A": "b"}})
    alone = await plane.submit()
    await plane.tick()
    told = {attempt.job_name: attempt.launch.env for attempt in (await plane.desired()).attempts}
    assert told["sweep[5]"] == {
        "A": "b",
        "PHALANX_ARRAY_ID": ids.encode("array", array_id),
        "PHALANX_ARRAY_INDEX": "5",
        "PHALANX_ARRAY_SIZE": "3",
    }
    assert alone and told["job"] == {}


async def test_an_array_is_cancelled_whole(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=2)
    array_id = await submit(plane, "0-4")
    await plane.tick()
    first, second, *_ = await members(plane, array_id)
    await plane.start(first.id)
    await plane.report(plane.ended(await plane.attempt(first.id), 0))
    await cancel_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    assert await states(plane, array_id) == {"succeeded": 1, "stopping": 1, "cancelled": 3}
    assert (await plane.attempt(second.id)).stop_cause == "cancel"
    await cancel_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    await plane.report(plane.ended(await plane.attempt(second.id), 0))
    assert await states(plane, array_id) == {"succeeded": 1, "cancelled": 4}
    for action in (cancel_array, hold_array, release_array, requeue_array):
        with pytest.raises(Conflict, match="have ended"):
            await action(plane.engine, array_id, actor=SYSTEM, now=plane.now)
        with pytest.raises(NotFound):
            await action(plane.engine, ids.new_id(), actor=SYSTEM, now=plane.now)


async def test_an_array_is_held_and_released(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    array_id = await submit(plane, "0-2")
    await hold_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    assert await states(plane, array_id) == {"queued": 3}
    await release_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    assert await states(plane, array_id) == {"starting": 3}


# ------------------------------------------------------------------ priority and requeue, of arrays and of jobs alone


async def test_a_priority_moves_a_job_in_the_queue_and_shows_on_one_that_runs(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=1)
    runs, _ = await plane.run()
    first, second = await plane.submit(), await plane.submit()
    await plane.tick()
    await set_priority(plane.engine, second, "high", actor=SYSTEM, now=plane.now)
    await set_priority(plane.engine, runs, -3, actor=SYSTEM, now=plane.now)
    await set_priority(plane.engine, runs, -3, actor=SYSTEM, now=plane.now)
    assert await plane.kinds(runs) == ["starting", "gang_ready", "running", "priority"]
    await plane.tick()
    assert plane.scheduler._memory is not None
    known = {job.id: job.priority for job in plane.scheduler._memory.planner.snapshot().jobs}
    assert known == {runs.hex: -3, first.hex: 0, second.hex: 10}
    assert (await plane.job(second)).spec["priority"] == "normal"
    for wrong in ("highest", 5000):
        with pytest.raises(Invalid):
            await set_priority(plane.engine, second, wrong, actor=SYSTEM, now=plane.now)


async def test_a_job_that_is_put_back_keeps_its_retries(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    await requeue_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await requeue_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    assert (await plane.state(job_id), (await plane.attempt(job_id)).stop_cause) == ("stopping", "requeue")
    await plane.report(plane.ended(attempt, 143))
    row = await plane.job(job_id)
    assert (row.state, row.failures, row.backoff_until, row.reason) == ("queued", 0, None, "requeued")
    with pytest.raises(Conflict, match="waits already"):
        await requeue_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    assert (await plane.attempt(job_id)).number == 2
    kinds = await plane.kinds(job_id)
    assert kinds[3:] == ["requeue_requested", "stopping", "attempt_ended", "queued", "starting"]


async def test_what_is_about_to_end_is_not_put_back(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    array_id = await submit(plane, "0-1")
    await plane.tick()
    await cancel_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    (first, _) = await members(plane, array_id)
    with pytest.raises(Conflict, match="being cancelled"):
        await requeue_job(plane.engine, first.id, actor=SYSTEM, now=plane.now)
    await requeue_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    assert (await plane.attempt(first.id)).stop_cause == "cancel"


async def test_an_array_changes_its_priority_and_is_put_back_as_a_whole(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=2)
    array_id = await submit(plane, "0-3")
    await plane.tick()
    await set_array_priority(plane.engine, array_id, "low", actor=SYSTEM, now=plane.now)
    await requeue_array(plane.engine, array_id, actor=SYSTEM, now=plane.now)
    assert {row.priority for row in await members(plane, array_id)} == {-10}
    assert await states(plane, array_id) == {"stopping": 2, "queued": 2}
