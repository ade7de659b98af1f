"""Jobs that wait for others: what they may wait for, and what the end of the others does to them."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_array, cancel_job
from phalanx_server.actions.settle_dependents import settle_dependents
from phalanx_server.actions.submit_jobs import Submission, Submitter
from phalanx_server.domain.access import SYSTEM, Actor
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.spec import parse_job
from phalanx_server.loops.enforce import Enforce
from phalanx_server.scheduling.snapshot import Dependency, Job
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_jobs
from phalanx_server.store.jobs import change_jobs
from phalanx_server.store.schema import dependencies, events, jobs, outbox, tenants
from sqlalchemy import insert, select


def named(job_id: UUID) -> str:
    return ids.encode("job", job_id)


async def after(plane: ControlPlane, *, ok: Any = (), any: Any = (), **fields: Any) -> UUID:
    """A job that waits for these."""
    wanted = {"ok": [x if isinstance(x, str) else named(x) for x in ok], "any": [named(x) for x in any]}
    return (await plane.submit_file(after=wanted, **fields)).jobs[0].id


async def known(plane: ControlPlane, job_id: UUID) -> Job:
    """The job as the planner knows it after a pass and its decisions, which is as a fresh load has it."""
    await plane.tick()
    await plane.tick()
    return (await plane.known_jobs())[job_id.hex]


async def hold_of(plane: ControlPlane, job_id: UUID) -> str:
    async with plane.engine.connect() as conn:
        text = "SELECT reason || ': ' || message FROM holds WHERE job_id = $1"
        return (await conn.exec_driver_sql(text, (job_id,))).scalar_one()


async def array(plane: ControlPlane, indices: str, **fields: Any) -> tuple[str, list[UUID]]:
    """The id of a new array, as the API has it, and its jobs."""
    (first,) = (await plane.submit_file(name="many", array={"indices": indices}, **fields)).jobs
    assert first.array_id is not None
    query = select(jobs.c.id).where(jobs.c.array_id == first.array_id).order_by(jobs.c.array_index)
    async with plane.engine.connect() as conn:
        return ids.encode("array", first.array_id), list((await conn.execute(query)).scalars())


async def end(plane: ControlPlane, job_id: UUID, code: int = 0) -> None:
    await plane.report(plane.ended(await plane.attempt(job_id), code))


async def test_a_job_starts_when_what_it_waits_for_has_succeeded(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    first, attempt = await plane.run()
    second = await after(plane, ok=[first])
    job = await known(plane, second)
    assert job.after == (Dependency(job=first.hex, on="ok"),)
    assert await hold_of(plane, second) == f"dependency: waits for {named(first)} to succeed"
    await plane.report(plane.ended(attempt, 0))
    assert (await plane.job(second)).unmet == 0 and await plane.rows(dependencies) == []
    assert (await known(plane, second)).after == ()
    assert await plane.state(second) == "starting"
    assert await plane.kinds(second) == ["submitted", "dependency_met", "starting"]


async def test_any_is_met_by_whatever_end(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    first, attempt = await plane.run()
    waits = await after(plane, any=[first])
    needs = await after(plane, ok=[first])
    await plane.report(plane.ended(attempt, 3))
    assert await plane.state(first) == "failed"
    assert (await plane.job(waits)).unmet == 0
    row = await plane.job(needs)
    assert (row.state, row.reason, row.finished_at, row.unmet) == ("cancelled", "dependency_failed", plane.now, 0)
    assert row.message == f"dependency failed: job ({named(first)}) failed"
    assert await plane.kinds(needs) == ["submitted", "cancelled"]
    assert [row.payload["job_id"] for row in await plane.rows(outbox) if row.topic == "job.cancelled"] == [named(needs)]


async def test_a_retry_is_no_end(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    first, attempt = await plane.run(retries={"max": 1, "backoff": 0})
    second = await after(plane, ok=[first])
    await plane.report(plane.ended(attempt, 3))
    assert (await plane.state(first), await plane.state(second)) == ("queued", "queued")
    await plane.tick()
    await plane.start(first)
    await end(plane, first)
    assert (await plane.job(second)).unmet == 0


async def test_a_failure_goes_down_the_whole_chain(plane: ControlPlane) -> None:
    """Link by link, each told of the one before it; who only waits for an end goes on."""
    first = await plane.submit()
    second = await after(plane, ok=[first], name="second")
    third = await after(plane, ok=[second], name="third")
    fourth = await after(plane, ok=[third, first])
    goes_on = await after(plane, any=[third])
    await cancel_job(plane.engine, first, actor=SYSTEM, now=plane.now)
    assert [await plane.state(each) for each in (second, third, fourth, goes_on)] == [*["cancelled"] * 3, "queued"]
    assert "second" in (await plane.job(third)).message
    assert (await plane.job(goes_on)).unmet == 0
    assert await plane.rows(dependencies) == []


async def test_all_conditions_must_be_met(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    runs = [(await plane.run())[0] for _ in range(3)]
    last = await after(plane, ok=runs[:2], any=runs[2:])
    for index, job_id in enumerate(runs):
        assert (await plane.job(last)).unmet == 3 - index
        assert len((await known(plane, last)).after) == 3 - index
        await end(plane, job_id, code=index // 2)
    await plane.tick()
    assert await plane.state(last) == "starting"


async def test_a_dependency_on_an_array_is_one_on_all_of_its_jobs(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=3)
    name, members = await array(plane, "0-2")
    await plane.tick()
    waits = await after(plane, ok=[name])
    assert (await known(plane, waits)).after == (Dependency(job=name, on="ok"),)
    for member in members:
        assert (await plane.job(waits)).unmet == 1
        await plane.start(member)
        await end(plane, member)
    assert (await plane.job(waits)).unmet == 0
    (event,) = [row for row in await plane.rows(events) if row.kind == "dependency_met"]
    assert event.message == f"All jobs of {name} are over; it waits for nothing else."


async def test_one_job_of_an_array_that_fails_is_enough(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=3)
    name, members = await array(plane, "0-2")
    await plane.tick()
    needs, _ = await after(plane, ok=[name]), await plane.start(members[1])
    waits = (await plane.submit_file(after={"any": [name]})).jobs[0].id
    await end(plane, members[1], code=1)
    row = await plane.job(needs)
    assert (row.state, row.message) == ("cancelled", f"dependency failed: many[1] ({named(members[1])}) failed")
    assert (await plane.job(waits)).unmet == 1, "two of its jobs still run"
    await cancel_array(plane.engine, ids.parse("array", name), actor=SYSTEM, now=plane.now)
    for member in (members[0], members[2]):
        await end(plane, member)
    assert (await plane.job(waits)).unmet == 0


async def test_an_array_that_waits_is_cancelled_as_a_whole(plane: ControlPlane) -> None:
    first = await plane.submit()
    _, members = await array(plane, "0-49", after={"ok": [named(first)]})
    assert len(await plane.rows(dependencies)) == 50
    last = await after(plane, ok=members[:5])
    await cancel_job(plane.engine, first, actor=SYSTEM, now=plane.now)
    assert {await plane.state(each) for each in [*members, last]} == {"cancelled"}


@pytest.mark.parametrize("code", [0, 1])
async def test_an_end_that_concerns_nobody_yet_locks_none_of_those_that_wait(plane: ControlPlane, code: int) -> None:
    """Else an array of n that waits for an array of m costs n times m locks, and is in the way of a cancel."""
    await plane.add_nodes(1, gpus=3)
    name, members = await array(plane, "0-2")
    await plane.tick()
    for member in members:
        await plane.start(member)
    waiting = (await plane.submit_file(array={"indices": "0-3"}, after={"any": [name]})).jobs[0].id
    async with plane.engine.begin() as conn:
        await lock_jobs(conn, [waiting], held=())
        for member in members[:2]:
            await asyncio.wait_for(end(plane, member, code), 5)
        last = asyncio.create_task(end(plane, members[2]))
        assert not (await asyncio.wait([last], timeout=0.3))[0], "the last end locks whom it lets go on"
    await last
    assert (await plane.job(waiting)).unmet == 0


async def test_the_last_two_jobs_of_an_array_may_end_at_the_same_time(plane: ControlPlane) -> None:
    name, (first, last) = await array(plane, "0-1")
    waiting = (await plane.submit_file(after={"any": [name]})).jobs[0].id
    async with plane.engine.begin() as conn:
        await change_jobs(conn, [first], {"state": "cancelled", "finished_at": plane.now})
        await settle_dependents(conn, [first], now=plane.now)
        other = asyncio.create_task(cancel_job(plane.engine, last, actor=SYSTEM, now=plane.now))
        await asyncio.wait([other], timeout=0.3)
    await other
    assert (await plane.job(waiting)).unmet == 0, "neither saw what the other had ended"


async def test_an_end_that_nobody_settled_is_settled_by_the_leader(plane: ControlPlane) -> None:
    """As when an older process, which does not take the lock, ends the other of the last two jobs of an array."""
    enforce = Enforce(plane.engine, plane.leader, policy=plane.policy)
    name, members = await array(plane, "0-1")
    alone, open_ = await plane.submit(), await plane.submit()
    goes_on = (await plane.submit_file(after={"any": [name, named(alone)]})).jobs[0].id
    needs = (await plane.submit_file(after={"ok": [name]})).jobs[0].id
    last = await after(plane, any=[needs])
    waits = await after(plane, any=[open_])
    async with plane.engine.begin() as conn:
        await change_jobs(conn, members[:1], {"state": "cancelled", "finished_at": plane.now})
    await enforce.tick(plane.now)
    assert (await plane.job(goes_on)).unmet == 2, "the array is open"
    async with plane.engine.begin() as conn:
        await change_jobs(conn, [members[1], alone], {"state": "cancelled", "finished_at": plane.now})
    await enforce.tick(plane.later(29))
    assert (await plane.job(goes_on)).unmet == 2, "it is looked at now and then"
    await enforce.tick(plane.later(1))
    assert [(await plane.job(each)).unmet for each in (goes_on, last, waits)] == [0, 0, 1]
    assert await plane.state(needs) == "cancelled" and len(await plane.rows(dependencies)) == 1


async def test_what_is_met_already_is_not_waited_for(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    first, attempt = await plane.run()
    await plane.report(plane.ended(attempt, 0))
    second = await after(plane, ok=[first], any=[])
    assert (await plane.job(second)).unmet == 0
    await plane.tick()
    assert await plane.state(second) == "starting"


async def test_a_job_that_waits_and_is_cancelled_waits_no_more(plane: ControlPlane) -> None:
    first = await plane.submit()
    second = await after(plane, ok=[first])
    third = await after(plane, any=[second])
    await cancel_job(plane.engine, second, actor=SYSTEM, now=plane.now)
    assert await plane.rows(dependencies) == []
    assert (await plane.job(third)).unmet == 0
    assert await plane.state(first) == "queued"


@pytest.mark.parametrize("kind", ["ok", "any"])
async def test_what_does_not_exist_or_may_not_be_seen_cannot_be_waited_for(plane: ControlPlane, kind: str) -> None:
    other = ids.new_id()
    async with plane.engine.begin() as conn:
        await conn.execute(insert(tenants).values(id=other, path="secret"))
    hidden = await plane.submit(tenant_id=other)
    ann = Actor("ann", "member", tenant="default")
    for name in (named(hidden), named(ids.new_id()), ids.encode("array", ids.new_id()), ids.encode("array", hidden)):
        with pytest.raises(Invalid, match=f"there is no {name}") as refused:
            await submit(plane, ann, {kind: [name]})
        assert refused.value.errors[0].field == f"after.{kind}[0]"
    assert len(await submit(plane, SYSTEM, {kind: [named(hidden)]})) == 1


async def test_what_can_never_be_met_is_refused_with_what_to_do(plane: ControlPlane) -> None:
    first = await plane.submit()
    await cancel_job(plane.engine, first, actor=SYSTEM, now=plane.now)
    with pytest.raises(Invalid, match=r"job was cancelled, so it can never be met.*after\.any"):
        await after(plane, ok=[first])
    assert (await plane.job(await after(plane, any=[first]))).unmet == 0


async def submit(plane: ControlPlane, actor: Actor, after: dict[str, list[str]]) -> list[UUID]:
    document = {"name": "a", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}, "after": after}
    submitter = Submitter(plane.engine)
    await submitter.start()
    try:
        accepted = await submitter.submit(Submission(specs=[parse_job(document)], actor=actor, received_at=plane.now))
    finally:
        await submitter.close()
    return [job.id for job in accepted.jobs]


async def test_no_end_is_missed_by_who_is_submitted_meanwhile(plane: ControlPlane) -> None:
    """Submits race with the ends of what they wait for, in several servers: each sees the end, or is told of it."""
    submitters = [Submitter(plane.engine) for _ in range(3)]
    for each in submitters:
        await each.start()
    document = {"name": "a", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}}
    for _ in range(15):
        name, members = await array(plane, "0-3")
        alone = await plane.submit()
        specs = [parse_job(document | {"after": {"any": [on]}}) for on in (name, named(alone)) for _ in range(4)]
        accepted = await asyncio.gather(
            *(
                submitters[index % 3].submit(Submission(specs=[spec], actor=SYSTEM, received_at=plane.now))
                for index, spec in enumerate(specs)
            ),
            *(cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now) for job_id in [*members, alone]),
        )
        made = [answer.jobs[0].id for answer in accepted if answer is not None]
        assert [(await plane.job(job_id)).unmet for job_id in made] == [0] * 8
    for each in submitters:
        await each.close()
    assert await plane.rows(dependencies) == []
