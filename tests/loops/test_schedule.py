"""The scheduling loop and leadership: one leads, passes go on from changes, holds are told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from control_plane import FENCE_S, LOSS_GRACE_S, START, ControlPlane
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.reason import NotBefore
from phalanx_server.loops.schedule import INTERVAL_S, ScheduleLoop, _first_part
from phalanx_server.scheduling.plan import Plan, Preemption, Resize
from phalanx_server.scheduling.planner import Planner
from phalanx_server.scheduling.snapshot import Policy, Snapshot
from phalanx_server.store.schema import attempts, holds, jobs, leases, quotas
from phalanx_server.store.snapshots import AGENT_SILENT_S, load_snapshot, reading
from phalanx_server.store.wakeups import Wakeups, notify
from sqlalchemy import func, insert, select, update
from structlog.testing import capture_logs


async def expire(plane: ControlPlane) -> None:
    """Let whatever lease there is run out."""
    async with plane.engine.begin() as conn:
        await conn.execute(update(leases).values(expires_at=func.now() - timedelta(seconds=1)))


async def hold_of(plane: ControlPlane, job_id: UUID) -> tuple[str, str] | None:
    async with plane.engine.connect() as conn:
        row = (await conn.execute(select(holds).where(holds.c.job_id == job_id))).one_or_none()
    return (row.reason, row.message) if row else None


def same(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots say the same, whatever the order of their lists."""
    keys = (lambda s: {j.id: j for j in s.jobs}), (lambda s: {n.name: n for n in s.nodes}), (lambda s: set(s.tenants))
    return all(key(one) == key(other) for key in keys[:2]) and [t.name for t in one.tenants] == [
        t.name for t in other.tenants
    ]


async def fresh(plane: ControlPlane) -> Snapshot:
    async with reading(plane.engine) as conn:
        snapshot, _ = await load_snapshot(conn, plane.now, Policy())
    return snapshot


async def test_who_waits_is_told_why_and_starts_when_there_is_room(plane: ControlPlane) -> None:
    await plane.add_nodes(1, gpus=4)
    first, attempt = await plane.run(gpus=3)
    second = await plane.submit(gpus=2)
    await plane.tick()
    told = await hold_of(plane, second)
    assert told is not None and told[0] == "capacity"
    assert await hold_of(plane, first) is None
    await plane.report(plane.ended(attempt, 0, 0, 0))
    await plane.tick()
    assert await plane.state(second) == "starting"
    assert await hold_of(plane, second) is None


async def test_a_pass_with_nothing_new_writes_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.submit(gpus=4)
    waiting = await plane.submit(gpus=4)
    await plane.tick()
    query = "SELECT xmin::text FROM holds"
    async with plane.engine.connect() as conn:
        before = (await conn.exec_driver_sql(query)).scalars().all()
    plane.later(1)
    done = await plane.tick()
    async with plane.engine.connect() as conn:
        assert (await conn.exec_driver_sql(query)).scalars().all() == before
    assert done.committed.started == {}
    assert await plane.state(waiting) == "queued"


async def test_a_job_on_hold_waits_until_it_is_released(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    await hold_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    assert (await hold_of(plane, job_id) or ("",))[0] == "held"
    await release_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def test_not_before_is_a_matter_of_time_alone(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit(not_before=(START + timedelta(seconds=30)).isoformat())
    await plane.tick()
    assert (await hold_of(plane, job_id) or ("",))[0] == "not_before"
    plane.later(30)
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def test_only_the_leader_acts_and_a_new_one_starts_from_what_is_stored(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    other = plane.new_leader("scheduler-2")
    second = ScheduleLoop(plane.engine, other, policy=Policy())
    assert await other.tick(plane.now) is None
    job_id = await plane.submit()
    assert await second.tick(plane.now) is None
    assert await plane.state(job_id) == "queued"
    await expire(plane)
    lease = await other.tick(plane.now)
    assert lease is not None and lease.epoch == 2
    assert await second.tick(plane.now) is not None
    assert await plane.state(job_id) == "starting"
    late = await plane.submit()
    assert await plane.tick() is None, "the old leader believes in its lease, and its commit is refused"
    assert await plane.state(late) == "queued"
    assert await plane.leader.tick(plane.now) is None
    assert await plane.tick() is None


async def test_two_schedulers_that_race_start_every_job_once(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=8)
    jobs = [await plane.submit() for _ in range(12)]
    other = plane.new_leader("scheduler-2")
    await expire(plane)
    await other.tick(plane.now)
    second = ScheduleLoop(plane.engine, other, policy=Policy())
    results = await asyncio.gather(plane.tick(), second.tick(plane.now), plane.tick(), second.tick(plane.now))
    assert sum(len(done.committed.started) for done in results if done) == len(jobs)
    assert len(await plane.rows(attempts)) == len(jobs)


async def test_a_lease_that_ran_out_comes_back_with_a_new_epoch(plane: ControlPlane) -> None:
    assert (await plane.leader.tick(plane.now)).epoch == 1  # type: ignore[union-attr]
    await expire(plane)
    assert (await plane.leader.tick(plane.now)).epoch == 2  # type: ignore[union-attr]
    await plane.leader.resign()
    assert plane.leader.lease is None
    assert (await plane.new_leader("scheduler-2").tick(plane.now)).epoch == 3  # type: ignore[union-attr]


async def test_a_leader_that_cannot_renew_stops_by_itself(plane: ControlPlane) -> None:
    clock = [0.0]
    leader = plane.new_leader("scheduler-2", ttl_s=4)
    leader._monotonic = lambda: clock[0]
    await plane.leader.resign()
    assert await leader.tick(plane.now) is not None
    clock[0] = 3.9
    assert leader.lease is not None
    clock[0] = 4.1
    assert leader.lease is None


async def test_after_an_error_the_planner_is_loaded_afresh(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.tick()
    memory = plane.scheduler._memory
    assert memory is not None
    memory.planner = None  # type: ignore[assignment]
    job_id = await plane.submit()
    with pytest.raises(AttributeError):
        await plane.tick()
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def test_a_start_that_is_dropped_twice_makes_it_load_afresh(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.tick()
    memory = plane.scheduler._memory
    assert memory is not None
    job_id = await plane.submit()
    node = await plane.node("node-0")
    async with plane.engine.begin() as conn:  # behind everybody's back: no change is recorded
        await conn.exec_driver_sql("ALTER TABLE nodes DISABLE TRIGGER touch")
        await conn.exec_driver_sql(f"UPDATE nodes SET state = 'cordoned' WHERE id = '{node.id}'")
        await conn.exec_driver_sql("ALTER TABLE nodes ENABLE TRIGGER touch")
    assert (await plane.tick()).committed.dropped and plane.scheduler._memory is memory
    assert (await plane.tick()).committed.dropped and plane.scheduler._memory is None
    assert (await plane.tick()).committed.dropped == {}
    assert await plane.state(job_id) == "queued"


async def test_a_commit_is_bounded_and_the_rest_starts_at_once(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit holds the lease: it must be over long before the lease runs out."""
    monkeypatch.setattr("phalanx_server.loops.schedule.STARTS_MAX", 2)
    await plane.add_nodes(1, gpus=5)
    waiting = [await plane.submit(priority=priority) for priority in (0, 5, 1, 7, 3)]
    started, pauses = [], []
    for _ in range(3):
        done = await plane.tick()
        started.append({waiting.index(UUID(hex=job)) for job in done.committed.started})
        pauses.append(plane.scheduler.pause_s)
    assert started == [{1, 3}, {2, 4}, {0}]
    assert pauses == [0, 0, INTERVAL_S]


def test_what_gives_way_for_one_job_is_never_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx_server.loops.schedule.STOPS_MAX", 3)
    victims = [Preemption(f"v{n}", whom, "reclaim", 0.0) for n, whom in enumerate(["a", "a", "b", "b", "a", None])]
    resizes = (Resize("r0", "c", 1, ()), Resize("r1", None, 1, ()))
    part, later = _first_part(Plan(preemptions=tuple(victims), resizes=resizes))
    assert [each.job for each in part.preemptions] == ["v0", "v1", "v4"]
    assert (part.resizes, later) == ((), {"b", "c", "v5", "r1"})
    part, later = _first_part(Plan(preemptions=tuple(victims[:4]) * 2))
    assert ({each.for_job for each in part.preemptions}, later) == ({"a"}, {"b"}), "the first is never too large"


async def test_a_node_that_is_not_alive_takes_nothing_new(plane: ControlPlane) -> None:
    """Its agent says that it is gone; it is not yet given up."""
    await plane.add_nodes(1)
    await plane.tick()
    plane.change_node("node-0", alive=False)
    await plane.send_inventory()
    job_id = await plane.submit()
    assert (await plane.tick()).plan.starts == ()
    told = await hold_of(plane, job_id)
    assert told is not None and told[0] == "capacity"
    assert (await plane.node("node-0")).state == "ready"
    plane.change_node("node-0", alive=True)
    await plane.send_inventory()
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def known_and_fresh_agree(plane: ControlPlane) -> bool:
    memory = plane.scheduler._memory
    assert memory is not None
    return same(memory.planner.snapshot(), await fresh(plane))


async def test_a_cluster_whose_agent_is_silent_takes_nothing_new_until_it_is_heard(plane: ControlPlane) -> None:
    """No row of a node changes: only time passes."""
    await plane.add_nodes(1)
    running, _ = await plane.run()
    plane.silent = True
    plane.later(AGENT_SILENT_S)
    early = await plane.submit()
    await plane.tick()
    assert await plane.state(early) == "starting", "not silent for long enough"
    plane.later(1)
    job_id = await plane.submit(gpus=2)
    assert (await plane.tick()).plan.starts == ()
    told = await hold_of(plane, job_id)
    assert told is not None and told[0] == "capacity"
    assert (await plane.node("node-0")).state == "ready"
    assert await plane.state(running) == "running"
    assert await known_and_fresh_agree(plane)
    await plane.send_inventory()
    await plane.tick()
    assert await plane.state(job_id) == "starting"
    await plane.tick()
    assert await known_and_fresh_agree(plane)


async def test_what_is_charged_on_a_lost_node_stays_in_the_quota(plane: ControlPlane) -> None:
    """Its ranks may still run there: who has 8 GPUs does not get 8 others until they are known to be gone."""
    await plane.add_nodes(2, gpus=8)
    async with plane.engine.begin() as conn:
        quota = {"tenant_id": plane.tenant_id, "resource": "h100", "nominal": 8, "borrowing_limit": 0}
        await conn.execute(insert(quotas).values(quota))
    lost, attempt = await plane.run(gpus=8, restart="eager")
    (place,) = await plane.placements(lost)
    await plane.lose(place.node)
    other = await plane.submit(gpus=8)
    for load in ("changes", "everything"):
        assert (await plane.tick()).plan.starts == (), load
        assert await known_and_fresh_agree(plane)
        plane.scheduler._memory = None
    for job_id in (lost, other):
        told = await hold_of(plane, job_id)
        assert told == ("quota", "needs 8 h100, and the quota of default leaves 0")
    await plane.report(plane.fact(attempt, "gone", node=place.node))
    await plane.tick()
    assert (await plane.state(lost), await plane.state(other)) == ("starting", "queued")
    await plane.tick()
    assert await known_and_fresh_agree(plane)


@pytest.mark.parametrize("restart", ["eager", "fenced"])
async def test_a_lost_node_that_never_comes_back_leaves_the_quota_after_its_fence(
    plane: ControlPlane, restart: str
) -> None:
    await plane.add_nodes(2, gpus=8)
    async with plane.engine.begin() as conn:
        quota = {"tenant_id": plane.tenant_id, "resource": "h100", "nominal": 8, "borrowing_limit": 0}
        await conn.execute(insert(quotas).values(quota))
    lost, _ = await plane.run(gpus=8, restart=restart)
    (place,) = await plane.placements(lost)
    await plane.lose(place.node)
    await plane.tick()
    plane.later(FENCE_S + LOSS_GRACE_S - 1)
    await plane.tick()
    assert await plane.state(lost) == "queued"
    plane.later(1)
    assert await known_and_fresh_agree_after_a_tick(plane)
    assert await plane.state(lost) == "starting"
    (place_now,) = await plane.placements(lost)
    assert place_now.node != place.node


async def test_a_node_that_is_lost_after_that_fence_takes_nothing_of_the_quota_either(plane: ControlPlane) -> None:
    """One attempt on two nodes, and nobody confirms its end on the second before that is lost too."""
    await plane.add_nodes(2, gpus=4)
    await plane.run(replicas=2, gpus=4)
    await plane.lose("node-0")
    plane.later(FENCE_S + LOSS_GRACE_S)
    await plane.tick()
    await plane.lose("node-1")
    assert await known_and_fresh_agree_after_a_tick(plane)


async def known_and_fresh_agree_after_a_tick(plane: ControlPlane) -> bool:
    await plane.tick()
    await plane.tick()  # reads what the first has started
    return await known_and_fresh_agree(plane)


async def test_changes_lead_to_what_a_fresh_load_says(plane: ControlPlane) -> None:
    await plane.add_nodes(3)
    gang, attempt = await plane.run(replicas=2, gpus=4)
    await plane.submit(gpus=4)
    await plane.tick()
    await plane.lose("node-1")
    plane.change_node("node-2", gpus=2, labels={"rack": "r1"})
    await plane.send_inventory()
    await plane.tick()
    assert same(plane.scheduler._memory.planner.snapshot(), await fresh(plane))  # type: ignore[union-attr]
    leftover = next(job for job in (await fresh(plane)).jobs if job.id == attempt.id.hex)
    assert (leftover.state, [item.replicas for item in leftover.placement]) == ("stopping", [1, 1])
    await plane.report(plane.fact(attempt, "gone", node="node-0"), plane.fact(attempt, "gone", node="node-1"))
    await plane.tick()
    await plane.tick()
    assert same(plane.scheduler._memory.planner.snapshot(), await fresh(plane))  # type: ignore[union-attr]
    assert attempt.id.hex not in {job.id for job in (await fresh(plane)).jobs}
    assert gang.hex in {job.id for job in (await fresh(plane)).jobs}


async def test_a_transaction_that_was_open_at_the_last_pass_is_not_missed(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    async with plane.engine.connect() as slow:
        transaction = await slow.begin()
        node_id = (await plane.node("node-0")).id
        await slow.exec_driver_sql(f"UPDATE nodes SET state = 'cordoned' WHERE id = '{node_id}'")
        for _ in range(3):  # later transactions come and go meanwhile
            await plane.submit(gpus=64)
            await plane.tick()
        await transaction.commit()
    job_id = await plane.submit()
    await plane.tick()
    assert await plane.state(job_id) == "queued"
    assert plane.scheduler._memory.planner.snapshot().nodes[0].state == "cordoned"  # type: ignore[union-attr]


async def test_it_is_woken_by_a_notice(plane: ControlPlane, database: str) -> None:
    """And by nothing else within this test: its own pause is far longer."""
    await plane.add_nodes(1)
    async with Wakeups(database) as wakeups:
        await wakeups.wait_listening(20)
        loop = ScheduleLoop(plane.engine, plane.leader, policy=Policy(), wakeups=wakeups)
        loop.pause_s = 600
        ticks: asyncio.Queue[object] = asyncio.Queue()
        loop.tick = ticks.put  # type: ignore[method-assign,assignment]
        task = asyncio.create_task(loop.run_forever())
        async with asyncio.timeout(20):
            await ticks.get()
            async with plane.engine.begin() as conn:
                await notify(conn, "queue")
            await ticks.get()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_leads_no_longer_takes_its_time(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deposed while more was waiting than one commit takes."""
    monkeypatch.setattr("phalanx_server.loops.schedule.STARTS_MAX", 1)
    await plane.add_nodes(1)
    for _ in range(3):
        await plane.submit()
    await plane.tick()
    assert plane.scheduler.pause_s == 0
    await plane.leader.resign()
    assert await plane.tick() is None
    assert plane.scheduler.pause_s == INTERVAL_S


@pytest.mark.parametrize("at", [datetime.max.replace(tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)])
async def test_a_time_at_the_end_of_all_dates_stops_no_pass(plane: ControlPlane, at: datetime) -> None:
    """It is refused today; a job that was accepted before waits, and nobody waits with it."""
    await plane.add_nodes(1)
    late, other = await plane.submit(), await plane.submit()
    async with plane.engine.begin() as conn:
        await conn.execute(update(jobs).where(jobs.c.id == late).values(not_before=at))
    for _ in range(2):
        await plane.tick()
    assert await plane.state(other) == "starting"
    told = await hold_of(plane, late)
    assert told is not None and told[0] == "not_before" and "9999-12-31" in told[1]


async def test_a_hold_without_words_costs_nobody_a_pass(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    await plane.add_nodes(1)
    late = await plane.submit(not_before=(START + timedelta(seconds=30)).isoformat())
    other = await plane.submit()

    def fails(why: NotBefore) -> str:
        raise ValueError("no words")

    monkeypatch.setattr(NotBefore, "message", fails)
    with capture_logs() as logged:
        await plane.tick()
        await plane.tick()
    assert await plane.state(other) == "starting"
    told = await hold_of(plane, late)
    assert told is not None and told[0] == "not_before" and "could not be put into words" in told[1]
    (error,) = [line for line in logged if line["log_level"] == "error"]
    assert (error["reason"], error["job"]) == ("not_before", late.hex)


async def test_the_planner_of_the_loop_is_the_pass_itself(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    for gpus in (4, 3, 2, 1):
        await plane.submit(gpus=gpus)
    snapshot = await fresh(plane)
    done = await plane.tick()
    assert done.plan == Planner(snapshot).plan()
