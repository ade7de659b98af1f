"""How fast elastic jobs are is measured while they run, and passes act upon it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.loops.measure_speeds import MeasureSpeeds
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Job, Policy
from phalanx_server.store.schema import speeds
from phalanx_server.store.snapshots import load_changes, load_snapshot, reading
from sqlalchemy import Row

ELASTIC = {"elastic": {"min_replicas": 1, "max_replicas": 4}}
PREFERS_FOUR = {"replicas": 4, "gpus_per_replica": 1, **ELASTIC}
PREFERS_ONE = {"replicas": 1, "gpus_per_replica": 1, **ELASTIC}


@pytest.fixture
async def still(plane: ControlPlane) -> ControlPlane:
    """One node of four GPUs, on which elastic jobs keep the replicas that they start with."""
    plane.policy = Policy(elastic=False)
    plane.scheduler = ScheduleLoop(plane.engine, plane.leader, policy=plane.policy)
    await plane.add_nodes(1)
    return plane


class Training:
    """A job that reports what a job does: a step, and further values, every ten seconds."""

    def __init__(self, plane: ControlPlane, job_id: UUID, attempt: Row[Any]) -> None:
        self.plane, self.job_id, self.attempt = plane, job_id, attempt
        self.measure = MeasureSpeeds(plane.engine, plane.leader)
        self.steps = 0.0

    @classmethod
    async def of(cls, plane: ControlPlane, resources: dict[str, Any] = PREFERS_FOUR, **fields: Any) -> Training:
        return cls(plane, *await plane.run(resources=resources, **fields))

    async def for_s(self, seconds: float, *, steps_per_s: float, **values: float) -> None:
        for _ in range(int(seconds / 10)):
            self.plane.later(10)
            self.steps += 10 * steps_per_s
            point = self.plane.metric(self.attempt, int(self.steps), **values)
            await self.plane.node_report("node-0", metrics=[point])
            await self.measure.tick(self.plane.now)

    async def ends(self, code: int = 0) -> None:
        await self.plane.report(self.plane.ended(self.attempt, code))

    async def again(self) -> None:
        """It fails, and starts again with as many replicas as there is room for."""
        await self.ends(1)
        await self.plane.tick()
        self.attempt = await self.plane.start(self.job_id)

    async def known(self) -> Job:
        """As the scheduler has it in memory after a pass, which is how another would load it."""
        await self.plane.tick()
        assert self.plane.scheduler._memory is not None
        live = {job.id: job for job in self.plane.scheduler._memory.planner.snapshot().jobs}
        async with reading(self.plane.engine) as conn:
            loaded = (await load_snapshot(conn, self.plane.now, self.plane.policy))[0].jobs
        assert {job.id: job.speedup for job in loaded} == {id_: job.speedup for id_, job in live.items()}
        return live[self.job_id.hex]


RETRIES = {"retries": {"max": 9, "backoff": 0}}


async def room_for(plane: ControlPlane, gpus: int) -> Row[Any]:
    """Take what is free but for so many GPUs; the attempt that does."""
    _, attempt = await plane.run(gpus=4 - gpus, preemption={"preemptible": False})
    return attempt


async def measured_with(plane: ControlPlane, by_replicas: dict[int, float], **fields: Any) -> Training:
    """A job that ran two minutes with each of these numbers of replicas, at so many steps per second."""
    training: Training | None = None
    for replicas, steps_per_s in by_replicas.items():
        rest = await room_for(plane, replicas) if replicas < 4 else None
        if training is None:
            training = await Training.of(plane, **RETRIES | fields)
        else:
            await training.again()
        assert training.attempt.replicas == replicas
        await training.for_s(120, steps_per_s=steps_per_s)
        if rest is not None:
            await plane.report(plane.ended(rest, 0))
    assert training is not None
    return training


async def test_what_a_job_does_with_each_number_of_replicas_reaches_the_pass_by_both_ways(still: ControlPlane) -> None:
    training = await measured_with(still, {1: 2.0})
    assert (await training.known()).speedup is None, "there is nothing to compare it with"
    await training.again()
    assert training.attempt.replicas == 4
    await training.for_s(20, steps_per_s=5.0)
    assert (await training.known()).speedup is None, "a few seconds are no figure"
    await training.for_s(100, steps_per_s=5.0)
    assert (await training.known()).speedup == {"1": 1.0, "4": 2.5}
    rows = {row.replicas: row for row in await still.rows(speeds)}
    assert {n: (row.unit, row.speed) for n, row in rows.items()} == {1: ("steps_per_s", 2.0), 4: ("steps_per_s", 5.0)}
    await training.ends(1)
    assert (await training.known()).speedup == {"1": 1.0, "4": 2.5}, "also while it waits"


async def test_the_first_seconds_of_an_attempt_do_not_count(still: ControlPlane) -> None:
    training = await Training.of(still)
    await training.for_s(10, steps_per_s=0.1)  # compiling, say
    await training.for_s(100, steps_per_s=3.0)
    (row,) = await still.rows(speeds)
    assert (row.speed, row.seconds) == (3.0, 90)


async def test_the_first_step_may_come_late(still: ControlPlane) -> None:
    training = await Training.of(still)
    still.later(600)
    await still.node_report("node-0", marks=[still.mark(training.attempt, "first_step")])
    await training.for_s(10, steps_per_s=0.1)
    assert await still.rows(speeds) == []
    await training.for_s(100, steps_per_s=3.0)
    assert [row.speed for row in await still.rows(speeds)] == [3.0]


async def test_where_the_batch_grows_with_the_replicas_samples_or_tokens_count(still: ControlPlane) -> None:
    rest = await room_for(still, 1)
    training = await Training.of(still, **RETRIES)
    await training.for_s(120, steps_per_s=2.0, tokens_per_s=1000.0)
    await still.report(still.ended(rest, 0))
    await training.again()
    await training.for_s(120, steps_per_s=2.0, tokens_per_s=3800.0)
    assert (await training.known()).speedup == {"1": 1.0, "4": 3.8}


async def test_what_was_told_is_not_told_again(still: ControlPlane) -> None:
    training = await measured_with(still, {1: 2.0, 4: 5.0})
    async with reading(still.engine) as conn:
        _, cursor = await load_snapshot(conn, still.now, still.policy)
    await training.for_s(60, steps_per_s=5.1)
    async with reading(still.engine) as conn:
        changes, cursor = await load_changes(conn, cursor, still.now)
    assert changes.jobs == (), "nothing that is worth telling"
    await training.for_s(300, steps_per_s=10.0)
    async with reading(still.engine) as conn:
        changes, _ = await load_changes(conn, cursor, still.now)
    (job,) = changes.jobs
    assert job.speedup is not None and job.speedup["4"] > 3


async def test_rigid_jobs_and_those_that_report_nothing_are_not_measured(still: ControlPlane) -> None:
    rigid = await Training.of(still, {"replicas": 1, "gpus_per_replica": 1})
    await rigid.for_s(120, steps_per_s=2.0)
    silent = await Training.of(still)
    still.later(300)
    assert await silent.measure.tick(still.now) == []
    assert await still.rows(speeds) == []


async def test_who_does_not_lead_does_not_measure(still: ControlPlane) -> None:
    training = await Training.of(still)
    training.measure = MeasureSpeeds(still.engine, still.new_leader("another"))
    await training.for_s(120, steps_per_s=2.0)
    assert await still.rows(speeds) == []


# ------------------------------------------------------------------ earlier jobs of the same kind


async def test_a_job_starts_from_what_an_earlier_one_of_its_name_had(still: ControlPlane) -> None:
    training = await measured_with(still, {1: 2.0, 4: 5.0}, name="gpt")
    await training.ends()
    other = await Training.of(still, name="bert")
    assert (await other.known()).speedup is None
    await other.ends()
    await still.tick()
    again = await Training.of(still, name="gpt")
    assert (await again.known()).speedup == {"1": 1.0, "4": 2.5}
    await again.for_s(120, steps_per_s=50.0)  # another model: what is absolute means nothing
    assert (await again.known()).speedup == {"1": 1.0, "4": 2.5}, "one size of its own says nothing yet"
    await again.ends()
    await still.tick()
    third = await Training.of(still, name="gpt")
    assert (await third.known()).speedup == {"1": 1.0, "4": 2.5}, "it is handed on"


async def test_what_it_measures_itself_replaces_that(still: ControlPlane) -> None:
    first = await measured_with(still, {1: 2.0, 4: 5.0}, name="gpt")
    await first.ends()
    await still.tick()
    second = await measured_with(still, {1: 2.0, 4: 7.0}, name="gpt")
    assert (await second.known()).speedup == {"1": 1.0, "4": 3.5}


# ------------------------------------------------------------------ what passes make of it


@pytest.mark.parametrize(("with_four", "grows"), [(2.1, False), (7.0, True)])
async def test_a_job_grows_where_it_was_measured_to_gain(plane: ControlPlane, with_four: float, grows: bool) -> None:
    plane.policy = Policy(elastic=False)
    plane.scheduler = ScheduleLoop(plane.engine, plane.leader, policy=plane.policy)
    await plane.add_nodes(1)
    training = await measured_with(plane, {1: 2.0, 4: with_four}, name="gpt")
    await training.ends()
    plane.policy = Policy()
    plane.scheduler = ScheduleLoop(plane.engine, plane.leader, policy=plane.policy)
    job_id = await plane.submit(resources=PREFERS_ONE, name="gpt", time_limit=60)
    await plane.tick()
    assert (await plane.start(job_id)).replicas == 1
    plane.later(1)
    done = await plane.tick()
    assert [(each.job, each.replicas) for each in done.plan.resizes] == ([(job_id.hex, 4)] if grows else [])
