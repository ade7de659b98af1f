"""Cancel, hold and release, from every state a job can be in."""

from datetime import UTC, datetime

import pytest
from phalanx_server.actions.bootstrap import bootstrap
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, NotFound
from phalanx_server.domain.spec import parse_job
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import attempts, audit, clusters, events, holds, jobs, outbox, tenants
from sqlalchemy import insert, select

NOW = datetime(2026, 11, 21, tzinfo=UTC)
ANN = Actor("ann", "member", tenant="default")
SPEC = parse_job({"name": "a", "resources": {"gpus": 1}, "run": {"command": "true"}}).dump()


@pytest.fixture
async def ready(engine):
    await bootstrap(engine)
    return engine


async def add_job(engine, state="queued", *, attempt_state=None):
    job, attempt = new_id(), new_id()
    async with engine.begin() as conn:
        times = {"received_at": NOW, "submitted_at": NOW, "queued_at": NOW}
        over = {"finished_at": NOW} if state in ("succeeded", "failed", "cancelled") else {}
        tenant = await conn.scalar(select(tenants.c.id))
        row = {"id": job, "tenant_id": tenant, "name": "a", "spec": SPEC, "created_by": "x", "state": state}
        await conn.execute(insert(jobs).values(**row, **times, **over))
        if attempt_state:
            cluster = await conn.scalar(select(clusters.c.id))
            row = {"id": attempt, "job_id": job, "cluster_id": cluster, "number": 1, "epoch": 0, "state": attempt_state}
            cause = {"stop_cause": "preemption"} if attempt_state == "stopping" else {}
            await conn.execute(insert(attempts).values(**row, gpu_type="x", replicas=1, created_at=NOW, **cause))
        if state == "queued":
            await conn.execute(insert(holds).values(job_id=job, reason="capacity", message="m", since=NOW))
    return job


async def read(engine, job):
    async with engine.connect() as conn:
        return (await conn.execute(select(jobs).where(jobs.c.id == job))).one()


async def kinds(engine, job):
    async with engine.connect() as conn:
        return (
            (await conn.execute(select(events.c.kind).where(events.c.job_id == job).order_by(events.c.id)))
            .scalars()
            .all()
        )


async def test_a_waiting_job_is_cancelled_at_once(ready):
    job = await add_job(ready)
    await cancel_job(ready, job, actor=ANN, now=NOW)
    row = await read(ready, job)
    assert (row.state, row.finished_at, row.cancel_requested_at, row.reason) == ("cancelled", NOW, NOW, "cancelled")
    assert await kinds(ready, job) == ["cancelled"]
    async with ready.connect() as conn:
        assert (await conn.execute(select(holds))).all() == []
        assert await conn.scalar(select(audit.c.actor).where(audit.c.action == "cancel_job")) == "ann"
        assert await conn.scalar(select(outbox.c.topic)) == "job.cancelled"


@pytest.mark.parametrize("state", ["starting", "running"])
async def test_a_job_that_holds_gpus_is_asked_to_stop(ready, state):
    job = await add_job(ready, state, attempt_state=state)
    await cancel_job(ready, job, actor=ANN, now=NOW)
    row = await read(ready, job)
    assert (row.state, row.finished_at, row.cancel_requested_at) == ("stopping", None, NOW)
    async with ready.connect() as conn:
        attempt = (await conn.execute(select(attempts))).one()
    assert (attempt.state, attempt.stop_cause, attempt.stop_requested_at) == ("stopping", "cancel", NOW)
    assert await kinds(ready, job) == ["cancel_requested", "stopping"]


async def test_a_job_that_stops_for_another_reason_is_cancelled_when_it_has_stopped(ready):
    job = await add_job(ready, "stopping", attempt_state="stopping")
    await cancel_job(ready, job, actor=ANN, now=NOW)
    row = await read(ready, job)
    assert (row.state, row.cancel_requested_at) == ("stopping", NOW)


async def test_cancelling_again_changes_nothing(ready):
    job = await add_job(ready)
    await cancel_job(ready, job, actor=ANN, now=NOW)
    before = await read(ready, job)
    await cancel_job(ready, job, actor=ANN, now=NOW)
    assert await read(ready, job) == before


@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_what_has_ended_cannot_be_cancelled_or_held(ready, state):
    job = await add_job(ready, state)
    for action in (cancel_job, hold_job, release_job):
        with pytest.raises(Conflict, match=f"already {state}"):
            await action(ready, job, actor=ANN, now=NOW)


async def test_a_job_that_does_not_exist_is_not_found(ready):
    for action in (cancel_job, hold_job, release_job):
        with pytest.raises(NotFound):
            await action(ready, new_id(), actor=ANN, now=NOW)


@pytest.mark.parametrize("state", ["queued", "running"])
async def test_hold_and_release_are_intent_and_leave_the_state(ready, state):
    job = await add_job(ready, state)
    for action, held in ((hold_job, True), (hold_job, True), (release_job, False), (release_job, False)):
        await action(ready, job, actor=ANN, now=NOW)
        row = await read(ready, job)
        assert (row.held, row.state) == (held, state)
    assert await kinds(ready, job) == ["held", "released"], "doing it twice is not worth an event"
    assert row.version == 3
