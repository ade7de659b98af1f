"""What a plan decides besides starts: jobs are preempted, resized and moved, and nobody in vain."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.commit_plan import Committed, commit_plan
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.node import NodeState
from phalanx_server.domain.reason import Held
from phalanx_server.scheduling.plan import HoldGroup, Migration, Plan, Preemption, Resize, Start
from phalanx_server.scheduling.snapshot import Job, PlacementItem, Policy, Seat, Snapshot
from phalanx_server.store import ids
from phalanx_server.store.holds import HoldRow
from phalanx_server.store.schema import attempts, events, holds, placements, tenants
from phalanx_server.store.snapshots import Cursor, load_changes, load_snapshot, reading
from sqlalchemy import insert

ELASTIC = {"elastic": {"min_replicas": 1, "max_replicas": 4}}


async def seen(plane: ControlPlane) -> tuple[Snapshot, Cursor]:
    async with reading(plane.engine) as conn:
        return await load_snapshot(conn, plane.now, Policy())


async def job_seen(plane: ControlPlane, job_id: UUID) -> Job:
    snapshot, _ = await seen(plane)
    return next(job for job in snapshot.jobs if job.id == job_id.hex)


async def commit(plane: ControlPlane, plan: Plan, *rows: HoldRow, cursor: Cursor | None = None) -> Committed:
    """Commit a plan that was made on what is so now, or on what `cursor` says."""
    cursor = cursor or (await seen(plane))[1]
    lease = plane.leader.lease
    assert lease is not None
    return await commit_plan(
        plane.engine, plan, lease, versions=cursor.versions, running=cursor.running, now=plane.now, holds=rows
    )


async def items(plane: ControlPlane, nodes: dict[str, int]) -> tuple[PlacementItem, ...]:
    return tuple([PlacementItem((await plane.node(name)).id.hex, count) for name, count in nodes.items()])


async def seat(plane: ControlPlane, nodes: dict[str, int]) -> Seat:
    return Seat(gpu_type="h100", placement=await items(plane, nodes))


async def start(plane: ControlPlane, job: UUID, nodes: dict[str, int]) -> Start:
    return Start(job.hex, "h100", sum(nodes.values()), await items(plane, nodes))


async def move(plane: ControlPlane, job: UUID, nodes: dict[str, int], for_job: UUID | None = None) -> Migration:
    return Migration(job.hex, for_job.hex if for_job else None, await items(plane, nodes))


async def resize(plane: ControlPlane, job: UUID, nodes: dict[str, int], for_job: UUID | None = None) -> Resize:
    return Resize(job.hex, for_job.hex if for_job else None, sum(nodes.values()), await items(plane, nodes))


def evict(job: UUID, for_job: UUID | None, reason: str = "within_tenant", lost_gpu_s: float = 15.0) -> Preemption:
    return Preemption(job.hex, for_job.hex if for_job else None, reason, lost_gpu_s)


async def waits(plane: ControlPlane, job: UUID, nodes: dict[str, int] | None) -> HoldRow:
    kept = await seat(plane, nodes) if nodes else None
    return HoldRow(job, "victims" if nodes else "capacity", "waits for others", (), None, kept)


async def where(plane: ControlPlane, job: UUID) -> dict[str, int]:
    return {row.node: row.replicas for row in await plane.placements(job)}


async def stopping_event(plane: ControlPlane, job: UUID) -> Any:
    (row,) = [row for row in await plane.rows(events, events.c.id) if row.job_id == job and row.kind == "stopping"]
    return row


class Follower:
    """A pass that goes on from changes; `agrees` if it knows what a fresh load says."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    async def open(self) -> Follower:
        snapshot, self.cursor = await seen(self.plane)
        self.jobs = {job.id: job for job in snapshot.jobs}
        return self

    async def agrees(self) -> bool:
        async with reading(self.plane.engine) as conn:
            changes, self.cursor = await load_changes(conn, self.cursor, self.plane.now)
        self.jobs |= {job.id: job for job in changes.jobs}
        for job in changes.removed_jobs:
            self.jobs.pop(job, None)
        snapshot, cursor = await seen(self.plane)
        assert {job.id: job for job in snapshot.jobs} == self.jobs
        assert (cursor.versions, cursor.running, cursor.kept) == (
            self.cursor.versions,
            self.cursor.running,
            self.cursor.kept,
        )
        return True


async def big_waits(plane: ControlPlane, **fields: Any) -> UUID:
    return await plane.submit(gpus=4, name="big", priority="high", **fields)


# ------------------------------------------------------------------ preempted


async def test_a_victim_ends_gracefully_and_its_place_is_kept_for_who_waits(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    victim, attempt = await plane.run(gpus=3, preemption={"grace": 7})
    big = await big_waits(plane)
    follower = await Follower(plane).open()
    done = await commit(plane, Plan(preemptions=(evict(victim, big),)), await waits(plane, big, {"node-0": 1}))
    assert (done.stopped, done.dropped, done.unheld) == ({victim.hex: StopCause.PREEMPTION}, {}, frozenset())
    (row,) = await plane.rows(attempts)
    assert (row.state, row.stop_cause, row.stop_reason, row.stop_for, row.grace_s, row.next) == (
        "stopping",
        "preemption",
        "within_tenant",
        big,
        7,
        None,
    )
    told, name = await stopping_event(plane, victim), ids.encode("job", big)
    assert told.message == (
        f"Gives way to big ({name}), which goes before it within the tenant;"
        " 15 GPU-seconds of work that no checkpoint holds are lost; its ranks are being ended."
    )
    assert told.data == {
        "attempt": 1,
        "cause": "preemption",
        "reason": "within_tenant",
        "for": name,
        "lost_gpu_s": 15.0,
    }
    assert (await plane.desired()).attempts[0].action == "stop"
    assert (await job_seen(plane, victim)).for_job == big.hex
    assert (await job_seen(plane, big)).kept == await seat(plane, {"node-0": 1})
    assert await follower.agrees()

    await plane.tick()
    assert await plane.state(big) == "queued"
    await plane.report(plane.ended(attempt, 1))
    assert (await plane.attempt(victim)).outcome == "preempted"
    job = await plane.job(victim)
    assert (job.state, job.failures, job.backoff_until) == ("queued", 0, None)
    assert job.message == "gave way to another job of its tenant"
    assert await follower.agrees()
    await plane.tick()
    assert (await plane.state(big), await plane.state(victim)) == ("starting", "queued")
    assert {row.job_id for row in await plane.rows(holds)} == {victim}
    assert await follower.agrees()


@pytest.mark.parametrize("finished", [False, True])
async def test_only_a_job_that_says_it_has_finished_is_not_queued_again(plane: ControlPlane, finished: bool) -> None:
    await plane.add_nodes(1, gpus=4)
    victim, attempt = await plane.run(gpus=4)
    big = await big_waits(plane)
    await commit(plane, Plan(preemptions=(evict(victim, big),)))
    if finished:
        await plane.node_report("node-0", marks=[plane.mark(attempt, "finished")])
    await plane.report(plane.ended(attempt, 0))
    assert await plane.state(victim) == ("succeeded" if finished else "queued")


async def test_nobody_gives_way_in_vain(plane: ControlPlane) -> None:
    """One of three victims has changed since the pass; an unrelated decision still holds."""
    await plane.add_nodes(2, gpus=4)
    changed, second, third, other = [(await plane.run())[0] for _ in range(4)]
    big = await big_waits(plane)
    _, cursor = await seen(plane)
    await hold_job(plane.engine, changed, actor=SYSTEM, now=plane.now)
    plan = Plan(
        preemptions=(evict(second, big), evict(changed, big), evict(other, None, "maintenance")),
        resizes=(await resize(plane, third, {"node-1": 1}, big),),
    )
    done = await commit(plane, plan, await waits(plane, big, {"node-0": 1}), cursor=cursor)
    assert done.stopped == {other.hex: StopCause.DRAIN}
    assert done.dropped == {
        changed.hex: "the job has changed since the pass looked at it",
        second.hex: "another decision for the same job no longer holds",
        third.hex: "another decision for the same job no longer holds",
    }
    assert done.unheld == {big.hex}
    assert await plane.rows(holds) == []
    assert [await plane.state(job) for job in (changed, second, third)] == ["running"] * 3


@pytest.mark.parametrize("how", ["held", "cancelled", "released"])
async def test_nobody_gives_way_for_a_job_that_no_longer_waits_as_it_did(plane: ControlPlane, how: str) -> None:
    await plane.add_nodes(1, gpus=4)
    victim, _ = await plane.run(gpus=4)
    big = await big_waits(plane, held=how == "released")
    _, cursor = await seen(plane)
    deed = {"held": hold_job, "cancelled": cancel_job, "released": release_job}[how]
    await deed(plane.engine, big, actor=SYSTEM, now=plane.now)
    done = await commit(plane, Plan(preemptions=(evict(victim, big),)), cursor=cursor)
    assert done.dropped == {victim.hex: "the job that it would give way to no longer waits as the pass saw it"}
    assert await plane.state(victim) == "running"


@pytest.mark.parametrize("how", ["cordoned", "lost", "smaller", "silent", "open"])
async def test_nobody_gives_way_for_a_place_that_has_closed_meanwhile(plane: ControlPlane, how: str) -> None:
    """Its victim is on another node than the one that closes: only what is kept tells."""
    await plane.add_nodes(1, gpus=3)
    victim, _ = await plane.run(gpus=3)
    await plane.add_nodes(1, gpus=4)
    big = await plane.submit(replicas=2, gpus=3, name="big", priority="high")
    held = HoldGroup([big.hex], Held(), await seat(plane, {"node-0": 1, "node-1": 1}))
    _, cursor = await seen(plane)
    match how:
        case "cordoned":
            node_id = (await plane.node("node-1")).id
            await set_node_state(plane.engine, node_id, wanted=NodeState.CORDONED, actor=SYSTEM, now=plane.now)
        case "lost":
            await plane.lose("node-1")
        case "smaller":
            plane.change_node("node-1", gpus=2)
            await plane.send_inventory()
        case "silent":
            plane.later(3600)
    done = await commit(
        plane,
        Plan(preemptions=(evict(victim, big),), hold_groups=(held,)),
        await waits(plane, big, {"node-0": 1, "node-1": 1}),
        cursor=cursor,
    )
    assert await plane.state(victim) == ("stopping" if how == "open" else "running")
    assert done.unheld == (frozenset() if how == "open" else {big.hex})
    assert (
        set(done.dropped.values())
        == {
            "cordoned": {"a node does not take work"},
            "lost": {"a node does not take work"},
            "smaller": {"node-1 will have no room for it"},
            "silent": {"the agent of node-0 is silent"},
            "open": set(),
        }[how]
    )


async def test_who_stops_already_is_not_stopped_again(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    victim, _ = await plane.run(gpus=4)
    big = await big_waits(plane)
    _, cursor = await seen(plane)
    plan = Plan(preemptions=(evict(victim, big),))
    assert (await commit(plane, plan, cursor=cursor)).stopped
    assert (await commit(plane, plan, cursor=cursor)).dropped == {
        victim.hex: "the job has changed since the pass looked at it"
    }
    assert victim.hex not in (await seen(plane))[1].running


async def test_a_victim_is_told_no_name_of_another_tenant(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    other = ids.new_id()
    async with plane.engine.begin() as conn:
        await conn.execute(insert(tenants).values(id=other, path="other"))
    victim, attempt = await plane.run(gpus=4)
    big = await big_waits(plane, tenant_id=other)
    await commit(plane, Plan(preemptions=(evict(victim, big, "reclaim", 0.0),)))
    told = await stopping_event(plane, victim)
    assert told.message == (
        "Gives way to a job of another tenant, whose tenant takes its own quota back; nothing of its work is lost;"
        " its ranks are being ended."
    )
    assert "for" not in told.data
    await plane.report(plane.ended(attempt, 0))
    assert (await plane.job(victim)).message == "gave way to a tenant that took its own quota back"


async def test_a_maintenance_window_drains(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    victim, attempt = await plane.run(gpus=4)
    await commit(plane, Plan(preemptions=(evict(victim, None, "maintenance"),)))
    assert (await stopping_event(plane, victim)).message.startswith("Gives way to the maintenance of its node; 15 GPU")
    await plane.report(plane.ended(attempt, 0))
    row = await plane.attempt(victim)
    assert (row.stop_cause, row.outcome, row.message) == ("drain", "drained", "its node goes into maintenance")
    assert await plane.state(victim) == "queued"


async def test_an_old_version_of_what_is_kept_goes_when_a_hold_says_otherwise(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    await plane.run(gpus=4)
    big = await big_waits(plane)
    follower = await Follower(plane).open()
    await commit(plane, Plan(), await waits(plane, big, {"node-0": 1}))
    assert await follower.agrees()
    assert (await job_seen(plane, big)).kept is not None
    await hold_job(plane.engine, big, actor=SYSTEM, now=plane.now)
    assert await follower.agrees()
    assert (await job_seen(plane, big)).kept is None, "nothing is kept for a job that is on hold"
    await release_job(plane.engine, big, actor=SYSTEM, now=plane.now)
    assert await follower.agrees()
    await commit(plane, Plan(), await waits(plane, big, None))
    assert await follower.agrees()
    assert (await job_seen(plane, big)).kept is None


async def test_a_kept_place_that_lapsed_is_forgotten_by_the_next_pass(plane: ControlPlane) -> None:
    """And what is kept now is stored whatever else is news."""
    await plane.add_nodes(1, gpus=4)
    await plane.run(gpus=4)
    big = await big_waits(plane)
    await commit(plane, Plan(), await waits(plane, big, {"node-0": 1}))
    await plane.tick()
    (row,) = await plane.rows(holds)
    assert (row.job_id, row.kept) == (big, None)


# ------------------------------------------------------------------ resized and moved


async def test_a_job_is_resized_and_goes_on_from_its_last_checkpoint(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=4)
    job, attempt = await plane.run(replicas=2, gpus=2, resources=ELASTIC)
    (home,) = {row.node for row in await plane.placements(job)}
    await plane.node_report(home, marks=[plane.mark(attempt, "checkpoint", url="s3://b/9", step=9)])
    follower = await Follower(plane).open()
    assert (await job_seen(plane, job)).checkpointed_at == plane.now.timestamp()
    plane.later(10)
    done = await commit(plane, Plan(resizes=(await resize(plane, job, {"node-0": 2, "node-1": 1}),)))
    assert done.stopped == {job.hex: StopCause.RESIZE}
    told = await stopping_event(plane, job)
    assert told.message == "Goes on with 3 replicas instead of 2; its ranks are being ended."
    assert (told.data["replicas"], told.data["nodes"]) == (3, ["node-0", "node-1"])
    shown = await job_seen(plane, job)
    assert (shown.state, shown.next) == ("stopping", await seat(plane, {"node-0": 2, "node-1": 1}))
    assert (shown.min_replicas, shown.max_replicas, shown.replicas) == (1, 4, 2)
    assert await follower.agrees()

    plane.later(5)
    await plane.report(plane.ended(attempt, 0))
    assert (await plane.attempt(job)).outcome == "resized"
    waiting = await plane.job(job)
    assert (waiting.state, waiting.failures, waiting.backoff_until) == ("queued", 0, None)
    shown = await job_seen(plane, job)
    assert (shown.kept, shown.last_resized_at) == (
        await seat(plane, {"node-0": 2, "node-1": 1}),
        plane.now.timestamp(),
    )
    assert await follower.agrees()
    late = await plane.submit(gpus=4, priority="urgent")
    await plane.tick()
    assert (await plane.state(job), await plane.state(late)) == ("starting", "queued"), "nobody takes its place"
    assert await where(plane, job) == {"node-0": 2, "node-1": 1}
    again = await plane.start(job)
    assert (again.number, again.replicas, again.resume_from) == (2, 3, "s3://b/9")
    (desired,) = (await plane.desired()).attempts
    assert (desired.launch.world_size, desired.launch.resume_from) == (6, "s3://b/9")
    assert (await job_seen(plane, job)).placement == await items(plane, {"node-0": 2, "node-1": 1})
    assert await follower.agrees()


async def test_a_job_is_moved_so_that_another_can_start(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=4)
    job, attempt = await plane.run(gpus=2)
    (home,) = await where(plane, job)
    other = "node-1" if home == "node-0" else "node-0"
    pinned, _ = await plane.run(gpus=1)
    assert set(await where(plane, pinned)) == {home}
    big = await plane.submit(gpus=3, name="big")
    done = await commit(
        plane, Plan(migrations=(await move(plane, job, {other: 1}, big),)), await waits(plane, big, {home: 1})
    )
    assert done.stopped == {job.hex: StopCause.MIGRATION}
    told = await stopping_event(plane, job)
    assert told.message.startswith(f"Moves to {other}, so that big (job_")
    await plane.tick()
    assert await plane.state(big) == "queued", "it would have had room on the other node"
    await plane.report(plane.ended(attempt, 0))
    await plane.tick()
    assert (await where(plane, job), await where(plane, big)) == ({other: 1}, {home: 1})


async def test_what_a_stopping_job_goes_on_in_is_given_to_nobody_else(plane: ControlPlane) -> None:
    """The larger of what it holds and its next place is charged: of node-0 two GPUs, of node-1 three."""
    await plane.add_nodes(2, gpus=4)
    job, _ = await plane.run(replicas=2, gpus=1, resources={"memory_per_replica": "20GiB", **ELASTIC})
    (home,) = await where(plane, job)
    other = "node-1" if home == "node-0" else "node-0"
    await commit(plane, Plan(resizes=(await resize(plane, job, {home: 1, other: 3}),)))
    small, large = await plane.submit(), await plane.submit(gpus=2)
    big, heavy = await plane.submit(gpus=3), await plane.submit(resources={"memory_per_replica": "10GiB"})
    done = await commit(plane, Plan(starts=(await start(plane, large, {other: 1}),)))
    assert done.dropped == {large.hex: f"GPUs of {other} are no longer free"}
    done = await commit(plane, Plan(starts=(await start(plane, big, {home: 1}),)))
    assert done.dropped == {big.hex: f"GPUs of {home} are no longer free"}
    done = await commit(plane, Plan(starts=(await start(plane, heavy, {other: 1}),)))
    assert done.dropped == {heavy.hex: f"memory of {other} is no longer free"}
    starts = (await start(plane, small, {other: 1}), await start(plane, large, {home: 1}))
    assert len((await commit(plane, Plan(starts=starts))).started) == 2


async def test_two_jobs_change_places(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=4)
    (one, first), (two, second) = await plane.run(gpus=4), await plane.run(gpus=4)
    homes = await where(plane, one), await where(plane, two)
    plan = Plan(migrations=(await move(plane, one, homes[1]), await move(plane, two, homes[0])))
    assert len((await commit(plane, plan)).stopped) == 2
    await plane.report(plane.ended(first, 0))
    await plane.tick()
    assert await plane.state(one) == "queued", "the other has not left yet"
    await plane.report(plane.ended(second, 0))
    await plane.tick()
    assert (await where(plane, one), await where(plane, two)) == (homes[1], homes[0])


@pytest.mark.parametrize("how", ["cordoned", "full", "reserved"])
async def test_a_place_that_is_not_there_stops_nobody(plane: ControlPlane, how: str) -> None:
    await plane.add_nodes(2, gpus=4)
    job, _ = await plane.run(gpus=2)
    (home,) = await where(plane, job)
    other = "node-1" if home == "node-0" else "node-0"
    third, _ = await plane.run(gpus=2)
    fourth = await plane.submit(gpus=3)
    if how == "cordoned":
        node_id = (await plane.node(other)).id
        await set_node_state(plane.engine, node_id, wanted=NodeState.CORDONED, actor=SYSTEM, now=plane.now)
    elif how == "full":
        await commit(plane, Plan(starts=(await start(plane, fourth, {other: 1}),)))
    else:
        await plane.start(third)
        await commit(plane, Plan(migrations=(await move(plane, third, {other: 1}),)))
    (_, cursor), goal = await seen(plane), {other: 1} if how != "reserved" else {other: 2}
    plan = Plan(resizes=(await resize(plane, job, goal),))
    done = await commit(plane, plan, cursor=cursor)
    why = "a node does not take work" if how == "cordoned" else f"{other} will have no room for it"
    assert (done.stopped, done.dropped) == ({}, {job.hex: why})
    assert await plane.state(job) == "running"


async def moving(plane: ControlPlane) -> tuple[UUID, Any, str, str]:
    """A job that is stopping to go on on the other of two nodes: its attempt, its node, the other."""
    await plane.add_nodes(2, gpus=4)
    job, attempt = await plane.run(gpus=2)
    (home,) = await where(plane, job)
    other = "node-1" if home == "node-0" else "node-0"
    await commit(plane, Plan(migrations=(await move(plane, job, {other: 1}),)))
    return job, attempt, home, other


async def test_a_cancel_that_comes_meanwhile_wins(plane: ControlPlane) -> None:
    job, attempt, _, other = await moving(plane)
    follower = await Follower(plane).open()
    await cancel_job(plane.engine, job, actor=SYSTEM, now=plane.now)
    assert (await plane.attempt(job)).next is None
    assert (await job_seen(plane, job)).next is None
    assert await follower.agrees()
    late = await plane.submit(gpus=4)
    assert (await commit(plane, Plan(starts=(await start(plane, late, {other: 1}),)))).started
    await plane.report(plane.ended(attempt, 0))
    assert await plane.state(job) == "cancelled"
    assert await plane.rows(holds) == []


async def test_a_job_that_has_finished_meanwhile_goes_on_nowhere(plane: ControlPlane) -> None:
    job, attempt, home, _ = await moving(plane)
    await plane.node_report(home, marks=[plane.mark(attempt, "finished")])
    await plane.report(plane.ended(attempt, 0))
    assert await plane.state(job) == "succeeded"
    assert await plane.rows(holds) == []


async def test_a_loss_of_where_it_is_sends_it_back_to_the_queue(plane: ControlPlane) -> None:
    job, _, home, _ = await moving(plane)
    follower = await Follower(plane).open()
    await plane.lose(home)
    row, waiting = await plane.attempt(job), await plane.job(job)
    assert (row.state, row.next) == ("lost", None)
    assert waiting.state == "queued" and waiting.backoff_until is not None
    assert await plane.rows(holds) == []
    assert await follower.agrees()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_loss_of_where_it_goes_sends_it_back_to_the_queue(plane: ControlPlane, when: str) -> None:
    job, attempt, home, other = await moving(plane)
    if when == "before":
        await plane.lose(other)
    await plane.report(plane.ended(attempt, 0))
    if when == "after":
        await plane.lose(other)
    assert await plane.state(job) == "queued"
    await plane.tick()
    assert (await plane.state(job), await where(plane, job)) == ("starting", {home: 1})


async def test_nothing_is_charged_twice_and_nothing_is_left(plane: ControlPlane) -> None:
    job, attempt, _, _ = await moving(plane)
    await plane.report(plane.ended(attempt, 0))
    await plane.tick()
    await plane.report(plane.ended(await plane.start(job), 0))
    assert await plane.state(job) == "succeeded"
    assert all(row.released_at for row in await plane.rows(placements))
