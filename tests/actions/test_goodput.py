"""Where the time of a job's attempts went, from what nodes reported."""

from __future__ import annotations

from control_plane import ControlPlane
from phalanx_server.store.goodput import load_attempt_times


async def test_totals_and_steps_are_those_of_each_attempt(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job, first = await plane.run(gpus=2, retries={"max": 1, "backoff": 0})
    totals = {"data_wait_total_s": 1.0, "checkpoint_total_s": 0.5, "lost_s": 0.25}
    points = [plane.metric(first, step, loss=9.0 - step, productive_s=10.0 * step, **totals) for step in range(1, 4)]
    other_rank = plane.part(first, type(points[0]), rank=1, at=points[0].at, step=99, values={"loss": 1.0})
    await plane.node_report("node-0", metrics=[*points, other_rank], marks=[plane.mark(first, "first_step")])
    await plane.report(plane.ended(first, 1, 1))
    plane.later(60)
    await plane.tick()
    second = await plane.start(job)
    await plane.node_report("node-0", metrics=[plane.metric(second, 2, loss=7.0)])
    async with plane.engine.connect() as conn:
        one, two = await load_attempt_times(conn, job)
    assert (one.weight, one.first_step, one.last_step, one.productive_s) == (2, 1, 3, 30.0)
    assert (one.data_wait_s, one.checkpoint_s, one.rolled_back_s) == (1.0, 0.5, 0.25)
    assert one.first_step_at is not None and one.ended_at is not None
    assert (two.first_step, two.last_step, two.productive_s, two.data_wait_s) == (2, 2, None, 0.0)
