"""Where the time of a job's attempts went, from what nodes reported."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from control_plane import ControlPlane
from phalanx_server.domain.goodput import AttemptTime, goodput_of
from phalanx_server.loops.retain import Keep, Retain
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.goodput import load_attempt_times
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.schema import metrics

TOTALS = {"data_wait_total_s": 1.0, "checkpoint_total_s": 0.5, "lost_s": 0.25}
KEEP = Keep(metrics=timedelta(days=7), events=timedelta(days=90), logs=timedelta(days=30))


async def times(plane: ControlPlane, job: Any) -> list[AttemptTime]:
    async with plane.engine.connect() as conn:
        return await load_attempt_times(conn, job)


async def forget_metrics(plane: ControlPlane) -> None:
    storage = plane.storage.as_uri()
    files = {"files": plane.files, "bundles": BundleFiles(storage), "outputs": OutputFiles(storage)}
    await Retain(plane.engine, plane.leader, keep=KEEP, **files).tick(plane.later(9 * 86_400))
    assert await plane.rows(metrics) == []


async def test_totals_and_steps_are_those_of_each_attempt(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job, first = await plane.run(gpus=2, retries={"max": 1, "backoff": 0})
    points = [plane.metric(first, step, loss=9.0 - step, productive_s=10.0 * step, **TOTALS) for step in range(1, 4)]
    other_rank = plane.part(first, type(points[0]), rank=1, at=points[0].at, step=99, values={"loss": 1.0})
    await plane.node_report("node-0", metrics=[*points, other_rank], marks=[plane.mark(first, "first_step")])
    await plane.report(plane.ended(first, 1, 1))
    plane.later(60)
    await plane.tick()
    second = await plane.start(job)
    await plane.node_report("node-0", metrics=[plane.metric(second, 2, loss=7.0)])
    one, two = await times(plane, job)
    assert (one.weight, one.first_step, one.last_step, one.productive_s) == (2, 1, 3, 30.0)
    assert (one.data_wait_s, one.checkpoint_s, one.rolled_back_s) == (1.0, 0.5, 0.25)
    assert one.first_step_at is not None and one.ended_at is not None
    assert (two.first_step, two.last_step, two.productive_s, two.data_wait_s) == (2, 2, None, 0.0)


async def test_goodput_is_the_same_when_the_metrics_are_forgotten(plane: ControlPlane) -> None:
    """Of an attempt that ended, whose last report came later, and of one that goes on."""
    await plane.add_nodes(1)
    job, first = await plane.run(gpus=2, retries={"max": 1, "backoff": 0})
    plane.later(30)
    await plane.node_report("node-0", metrics=[plane.metric(first, 1, loss=1.0, productive_s=5.0, **TOTALS)])
    plane.later(30)
    await plane.report(plane.ended(first, 1, 1))
    await plane.node_report("node-0", metrics=[plane.metric(first, 4, productive_s=25.0)])
    plane.later(60)
    await plane.tick()
    second = await plane.start(job)
    plane.later(30)
    await plane.node_report("node-0", metrics=[plane.metric(second, 3, loss=1.0, productive_s=20.0)])
    before, asked_at = await times(plane, job), plane.now
    assert [attempt.last_step for attempt in before] == [4, 3]
    assert goodput_of(before, asked_at).parts["redone"] == 2 * 25.0 / 2
    await forget_metrics(plane)
    assert await times(plane, job) == before
    await plane.node_report("node-0", metrics=[plane.metric(second, 9, productive_s=60.0)])
    (_, now) = await times(plane, job)
    assert (now.first_step, now.last_step, now.productive_s) == (3, 9, 60.0)


async def test_a_report_that_comes_late_changes_nothing_that_is_newer(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job, attempt = await plane.run()
    late = plane.metric(attempt, 2, productive_s=2.0, lost_s=0.5)
    plane.later(10)
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 7, productive_s=7.0)])
    await plane.node_report("node-0", metrics=[late])
    (found,) = await times(plane, job)
    assert (found.first_step, found.last_step, found.productive_s, found.rolled_back_s) == (2, 7, 7.0, 0.5)


async def test_who_goes_back_behind_the_step_that_it_began_with_has_taken_the_lower_ones(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job, attempt = await plane.run()
    began = plane.later(10)
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 61, loss=1.0)])
    plane.later(10)
    back = plane.metric(attempt, 41, loss=1.0)
    plane.later(10)
    await plane.node_report("node-0", metrics=[back, plane.metric(attempt, 42, loss=1.0)])
    (found,) = await times(plane, job)
    assert (found.first_step, found.first_step_at, found.last_step) == (41, began, 42)


@pytest.mark.parametrize("together", [True, False])
async def test_an_epoch_is_no_step_to_go_back_to(plane: ControlPlane, together: bool) -> None:
    """Of a script whose own names do not say which steps are the training's: it began with the first in time."""
    await plane.add_nodes(1)
    job, attempt = await plane.run()
    plane.later(10)
    first = plane.metric(attempt, 5001, train_loss=1.0)
    plane.later(10)
    second = plane.metric(attempt, 6, accuracy=0.5)
    for report in [[first, second]] if together else [[first], [second]]:
        await plane.node_report("node-0", metrics=report)
    (found,) = await times(plane, job)
    assert (found.first_step, found.last_step, found.last_step_at) == (5001, 5001, plane.now)


async def test_steps_that_are_reported_without_a_value_count(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job, attempt = await plane.run()
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 1), plane.metric(attempt, 3)])
    (found,) = await times(plane, job)
    assert (found.first_step, found.last_step, found.productive_s) == (1, 3, None)


@pytest.mark.parametrize("epoch_is_first", [True, False])
async def test_steps_of_another_axis_than_the_trainings_count_only_without_it(
    plane: ControlPlane, epoch_is_first: bool
) -> None:
    """In one report as in several, whichever comes first."""
    await plane.add_nodes(1)
    job, attempt = await plane.run()
    for epoch in (1, 2):
        start = plane.later(10)
        trained = [plane.metric(attempt, 100 * epoch, loss=1.0)]
        plane.later(10)
        passed = [plane.metric(attempt, epoch, accuracy=0.5)]
        if epoch == 1 and epoch_is_first:
            await plane.node_report("node-0", metrics=passed)
            (found,) = await times(plane, job)
            assert (found.first_step, found.last_step) == (1, 1)
            passed = []
        await plane.node_report("node-0", metrics=trained + passed)
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 3, accuracy=0.5)])
    (found,) = await times(plane, job)
    assert (found.first_step, found.last_step, found.last_step_at) == (100, 200, start)
