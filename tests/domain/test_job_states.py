"""The transition tables: what the domain allows, SQL allows, and nothing else."""

from datetime import UTC, datetime

import pytest
from phalanx_server.domain.attempt import ATTEMPT_LIVE, ATTEMPT_TRANSITIONS, AttemptState
from phalanx_server.domain.job import JOB_TRANSITIONS, LIVE, TERMINAL, IllegalTransition, JobState, advance, priority_of
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import attempts, clusters, jobs, tenants
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("to", JobState)
def test_advance_takes_the_steps_of_the_table_and_no_other(state, to):
    if to in JOB_TRANSITIONS[state]:
        assert advance(state, to) is to
    else:
        with pytest.raises(IllegalTransition):
            advance(state, to)


def test_every_state_has_its_row_and_only_ends_are_final():
    assert set(JOB_TRANSITIONS) == set(JobState)
    assert {state for state, to in JOB_TRANSITIONS.items() if not to} == TERMINAL
    assert set(JobState) - TERMINAL - LIVE == {JobState.QUEUED}
    assert {state for state, to in ATTEMPT_TRANSITIONS.items() if to} == ATTEMPT_LIVE


async def add_job(conn: AsyncConnection, state: JobState):
    tenant, job = new_id(), new_id()
    await conn.execute(insert(tenants).values(id=tenant, path=f"t{tenant.hex}"))
    times = {"received_at": NOW, "submitted_at": NOW, "queued_at": NOW}
    finished_at = NOW if state in TERMINAL else None
    row = {"id": job, "tenant_id": tenant, "name": "a", "spec": {}, "created_by": "x", "state": state, **times}
    await conn.execute(insert(jobs).values(finished_at=finished_at, **row))
    return job


async def add_attempt(conn: AsyncConnection, job, state: AttemptState, *, number: int = 1):
    cluster, attempt = new_id(), new_id()
    await conn.execute(insert(clusters).values(id=cluster, name=f"c{cluster.hex}"))
    over = {} if state in ATTEMPT_LIVE else {"ended_at": NOW, "outcome": "failed"}
    row = {"id": attempt, "job_id": job, "cluster_id": cluster, "number": number, "epoch": number, "state": state}
    await conn.execute(insert(attempts).values(**row, gpu_type="h100", replicas=1, created_at=NOW, **over))
    return attempt


async def allowed_by_sql(conn: AsyncConnection, statement) -> bool:
    try:
        async with conn.begin_nested():
            await conn.execute(statement)
    except IntegrityError:
        return False
    return True


async def test_sql_allows_the_same_steps_of_a_job(engine):
    found: dict[JobState, set[JobState]] = {state: set() for state in JobState}
    async with engine.connect() as conn:
        for state in JobState:
            for to in set(JobState) - {state}:
                job = await add_job(conn, state)
                step = (
                    update(jobs).where(jobs.c.id == job).values(state=to, finished_at=NOW if to in TERMINAL else None)
                )
                if await allowed_by_sql(conn, step):
                    found[state].add(to)
    assert found == JOB_TRANSITIONS


async def test_sql_allows_the_same_steps_of_an_attempt(engine):
    found: dict[AttemptState, set[AttemptState]] = {state: set() for state in AttemptState}
    async with engine.connect() as conn:
        for state in AttemptState:
            for to in set(AttemptState) - {state}:
                attempt = await add_attempt(conn, await add_job(conn, JobState.RUNNING), state)
                over = {"ended_at": None, "outcome": None}
                if to not in ATTEMPT_LIVE:
                    over = {"ended_at": NOW, "outcome": "failed"}
                if await allowed_by_sql(
                    conn, update(attempts).where(attempts.c.id == attempt).values(state=to, **over)
                ):
                    found[state].add(to)
    assert found == ATTEMPT_TRANSITIONS


async def test_sql_keeps_what_must_always_hold(engine):
    """One live attempt per job; terminal if and only if finished; an epoch never goes back."""
    async with engine.connect() as conn:
        job = await add_job(conn, JobState.RUNNING)
        await add_attempt(conn, job, AttemptState.RUNNING)
        with pytest.raises(IntegrityError, match="attempts_one_live"):
            async with conn.begin_nested():
                await add_attempt(conn, job, AttemptState.STARTING, number=2)
        row = update(jobs).where(jobs.c.id == job)
        assert not await allowed_by_sql(conn, row.values(state="failed"))
        assert not await allowed_by_sql(conn, row.values(finished_at=NOW))
        assert await allowed_by_sql(conn, row.values(epoch=3))
        assert not await allowed_by_sql(conn, row.values(epoch=2))


@pytest.mark.parametrize(("given", "number"), [("low", -10), ("normal", 0), ("high", 10), ("urgent", 100), (7, 7)])
def test_a_priority_is_a_class_or_a_number(given, number):
    assert priority_of(given) == number


@pytest.mark.parametrize("given", ["highest", "", 1001, -1001])
def test_other_priorities_are_refused(given):
    with pytest.raises(ValueError, match=r"priority class|out of range"):
        priority_of(given)
