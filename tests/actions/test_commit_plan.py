"""Committing a plan: what no longer holds is dropped, and nothing is ever given twice."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.commit_plan import Committed, commit_plan
from phalanx_server.actions.expect_lease import LeaseLost
from phalanx_server.actions.hold_job import hold_job
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.node import NodeState
from phalanx_server.scheduling.plan import Plan, Start
from phalanx_server.scheduling.snapshot import PlacementItem
from phalanx_server.store.holds import HoldRow
from phalanx_server.store.leases import Lease
from phalanx_server.store.schema import attempts, checkpoints, holds, leases, placements
from phalanx_server.store.snapshots import AGENT_SILENT_S
from sqlalchemy import func, update
from sqlalchemy.exc import DBAPIError


async def start(plane: ControlPlane, job_id: UUID, nodes: dict[str, int]) -> Start:
    """A decision to start a job, so many replicas by node name."""
    placement = tuple([PlacementItem((await plane.node(name)).id.hex, count) for name, count in nodes.items()])
    return Start(job_id.hex, "h100", sum(nodes.values()), placement)


async def commit(plane: ControlPlane, *starts: Start, **values: Any) -> Committed:
    versions = {s.job: (await plane.job(UUID(hex=s.job))).version for s in starts}
    given = {"versions": versions, "now": plane.now} | values
    lease = given.pop("lease", plane.leader.lease)
    return await commit_plan(plane.engine, Plan(starts=tuple(starts)), lease, **given)


async def test_a_gang_gets_the_lowest_free_gpus_and_ranks_node_by_node(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    first = await plane.submit()
    await commit(plane, await start(plane, first, {"node-1": 1}))
    job_id = await plane.submit(replicas=3, gpus=2, resources={"ranks_per_replica": 2, "cpus_per_replica": 3})
    done = await commit(plane, await start(plane, job_id, {"node-1": 1, "node-0": 2}))
    attempt = await plane.attempt(job_id)
    assert done.started == {job_id.hex: attempt.id}
    assert (attempt.epoch, attempt.number, attempt.state, attempt.gpu_type) == (1, 1, "starting", "h100")
    assert [
        (p.node, p.group_rank, p.gpu_indices, p.first_rank, p.ranks, p.cpus) for p in await plane.placements(job_id)
    ] == [("node-0", 0, [0, 1, 2, 3], 0, 4, 6.0), ("node-1", 1, [1, 2], 4, 2, 3.0)]


async def test_the_same_plan_twice_starts_nothing_twice(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    decision = await start(plane, job_id, {"node-0": 1})
    versions = {job_id.hex: 1}
    results = await asyncio.gather(*(commit(plane, decision, versions=versions) for _ in range(4)))
    assert sum(len(result.started) for result in results) == 1
    assert len(await plane.rows(attempts)) == len(await plane.rows(placements)) == 1


async def test_gpus_that_are_taken_are_not_given_again(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    jobs = [await plane.submit(gpus=3) for _ in range(2)]
    done = await commit(plane, *[await start(plane, job, {"node-0": 1}) for job in jobs])
    assert list(done.started) == [jobs[0].hex]
    assert done.dropped == {jobs[1].hex: "GPUs of node-0 are no longer free"}
    assert await plane.state(jobs[1]) == "queued"


async def test_nothing_is_placed_where_the_agent_is_silent(plane: ControlPlane) -> None:
    """The pass was made before it was."""
    await plane.add_nodes(1)
    job_id = await plane.submit()
    decision = await start(plane, job_id, {"node-0": 1})
    plane.later(AGENT_SILENT_S + 1)
    done = await commit(plane, decision)
    assert done.dropped == {job_id.hex: "the agent of node-0 is silent"}
    await plane.send_inventory()
    assert list((await commit(plane, decision)).started) == [job_id.hex]


async def test_a_gang_is_all_or_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=2)
    small, gang, late = await plane.submit(), await plane.submit(replicas=2, gpus=2), await plane.submit(gpus=2)
    done = await commit(
        plane,
        await start(plane, small, {"node-1": 1}),
        await start(plane, gang, {"node-0": 1, "node-1": 1}),
        await start(plane, late, {"node-0": 1}),
    )
    assert set(done.started) == {small.hex, late.hex}, "what the gang did not take is still there for the next"
    assert await plane.state(gang) == "queued"
    assert {p.attempt_id for p in await plane.rows(placements)} == set(done.started.values())


@pytest.mark.parametrize("cpus", [17, 9])
async def test_cpus_are_counted_too(plane: ControlPlane, cpus: int) -> None:
    await plane.add_nodes(1)
    jobs = [await plane.submit(gpus=0, resources={"cpus_per_replica": cpus}) for _ in range(2)]
    done = await commit(plane, *[await start(plane, job, {"node-0": 1}) for job in jobs])
    assert len(done.started) == (0 if cpus > 16 else 1)


async def test_a_job_that_changed_is_dropped(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    decision = await start(plane, job_id, {"node-0": 1})
    await hold_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    assert (await commit(plane, decision, versions={job_id.hex: 1})).dropped == {
        job_id.hex: "the job has changed since the pass looked at it"
    }
    assert (await commit(plane, decision)).dropped == {job_id.hex: "the job is held or being cancelled"}


@pytest.mark.parametrize("how", ["cordoned", "lost", "not alive"])
async def test_a_node_that_takes_no_work_gets_none(plane: ControlPlane, how: str) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    decision = await start(plane, job_id, {"node-0": 1})
    if how == "lost":
        await plane.lose("node-0")
    elif how == "not alive":
        plane.change_node("node-0", alive=False)
        await plane.send_inventory()
    else:
        node_id = (await plane.node("node-0")).id
        await set_node_state(plane.engine, node_id, wanted=NodeState.CORDONED, actor=SYSTEM, now=plane.now)
    assert (await commit(plane, decision)).dropped == {job_id.hex: "a node does not take work"}


async def test_an_old_lease_commits_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    old = plane.leader.lease
    assert old is not None
    async with plane.engine.begin() as conn:
        await conn.execute(update(leases).values(expires_at=func.now() - timedelta(seconds=1)))
    other = plane.new_leader("scheduler-2")
    lease = await other.tick(plane.now)
    assert lease is not None and lease.epoch == old.epoch + 1
    decision = await start(plane, job_id, {"node-0": 1})
    with pytest.raises(LeaseLost):
        await commit(plane, decision, lease=old)
    with pytest.raises(LeaseLost):
        await commit(plane, decision, lease=Lease(old.name, other.lease.holder, old.epoch))  # type: ignore[union-attr]
    assert await plane.state(job_id) == "queued"
    assert len((await commit(plane, decision, lease=lease)).started) == 1


async def test_it_goes_on_from_the_checkpoint_that_was_registered_last(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(retries={"max": 1, "backoff": 0})
    marks = [plane.mark(attempt, "checkpoint", url=f"s3://b/{step}", step=step) for step in (500, 900)]
    await plane.node_report("node-0", marks=marks)
    plane.later(1)
    await plane.node_report("node-0", marks=[plane.mark(attempt, "checkpoint", url="s3://b/700", step=700)])
    assert len(await plane.rows(checkpoints)) == 3
    await plane.report(plane.ended(attempt, 1))
    await plane.tick()
    assert (await plane.attempt(job_id)).resume_from == "s3://b/700"
    assert (await plane.desired()).attempts[0].launch.resume_from == "s3://b/700"


async def test_two_live_attempts_of_a_job_are_impossible_in_sql(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run()
    attempt = dict((await plane.attempt(job_id))._mapping) | {"number": 2, "epoch": 2}
    attempt["id"] = plane.tenant_id
    with pytest.raises(DBAPIError, match="attempts_one_live"):
        async with plane.engine.begin() as conn:
            await conn.execute(attempts.insert().values(attempt))


async def test_holds_are_kept_by_reason_and_never_of_a_job_that_starts(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    starts, waits = await plane.submit(), await plane.submit()

    def hold(job_id: UUID, reason: str, message: str) -> HoldRow:
        return HoldRow(job_id, reason, message, ("more nodes",), None)

    await commit(plane, holds=[hold(starts, "quota", "a"), hold(waits, "quota", "a")])
    since = plane.now
    plane.later(5)
    decision = await start(plane, starts, {"node-0": 1})
    await commit(plane, decision, holds=[hold(starts, "quota", "b"), hold(waits, "quota", "b")])
    assert [(h.job_id, h.message, h.since) for h in await plane.rows(holds)] == [(waits, "b", since)]
    await commit(plane, holds=[hold(waits, "capacity", "c"), hold(starts, "quota", "late")])
    assert [(h.job_id, h.reason, h.since) for h in await plane.rows(holds)] == [(waits, "capacity", plane.now)]
