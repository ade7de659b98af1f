"""Maintenance windows while a scheduler leads: they reach the pass by both ways, keep jobs out, and put them out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.declare_maintenance import (
    WantedWindow,
    change_maintenance,
    declare_maintenance,
    delete_maintenance,
    end_maintenance,
)
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict
from phalanx_server.loops.retain import Keep, Retain
from phalanx_server.scheduling.snapshot import Maintenance, Snapshot
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.schema import audit, holds, maintenance
from phalanx_server.store.snapshots import load_changes, load_snapshot, reading


async def declare(plane: ControlPlane, *, start_s: float, lasts_s: float = 3600, **wanted: Any) -> UUID:
    """A window that begins in so many seconds."""
    starts_at = plane.now + timedelta(seconds=start_s)
    window = WantedWindow(starts_at=starts_at, ends_at=starts_at + timedelta(seconds=lasts_s), **wanted)
    async with plane.engine.begin() as conn:
        return await declare_maintenance(conn, window, actor=SYSTEM, now=plane.now)


async def fresh(plane: ControlPlane) -> Snapshot:
    async with reading(plane.engine) as conn:
        return (await load_snapshot(conn, plane.now, plane.policy))[0]


async def known(plane: ControlPlane) -> list[tuple[set[str], float, float]]:
    """Names of nodes, start and end, in seconds from now, of the windows that the scheduler has in memory after a pass,
    which are those that another would load."""
    await plane.tick()
    assert plane.scheduler._memory is not None
    live: tuple[Maintenance, ...] = plane.scheduler._memory.planner.snapshot().maintenance
    assert (await fresh(plane)).maintenance == live
    names = {(await plane.node(name)).id.hex: name for name in plane.facts}
    now = plane.now.timestamp()
    return [({names[node] for node in w.nodes}, w.starts_at - now, w.ends_at - now) for w in live]


async def hold_of(plane: ControlPlane, job_id: UUID) -> Any:
    return next((row for row in await plane.rows(holds) if row.job_id == job_id), None)


async def test_a_window_reaches_the_pass_by_both_ways_and_leaves_when_it_is_over(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    assert await known(plane) == []
    await declare(plane, start_s=100, lasts_s=50, nodes=["node-1"])
    assert await known(plane) == [({"node-1"}, 100, 150)]
    plane.later(149)
    assert await known(plane) == [({"node-1"}, -49, 1)]
    plane.later(1)
    assert await known(plane) == []


async def test_a_change_an_early_end_and_a_deletion_are_followed(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    window = await declare(plane, start_s=100, nodes=["node-0"])
    other = await declare(plane, start_s=200, nodes=["node-0"])
    assert len(await known(plane)) == 2
    changes = {"starts_at": plane.now + timedelta(seconds=50), "nodes": ["node-1"]}
    await change_maintenance(plane.engine, window, changes, actor=SYSTEM, now=plane.now)
    assert await known(plane) == [({"node-1"}, 50, 3700), ({"node-0"}, 200, 3800)]
    with pytest.raises(Conflict, match="has not begun"):
        await end_maintenance(plane.engine, window, actor=SYSTEM, now=plane.now)
    await delete_maintenance(plane.engine, other, actor=SYSTEM)
    assert await known(plane) == [({"node-1"}, 50, 3700)]
    await end_maintenance(plane.engine, window, actor=SYSTEM, now=plane.later(60))
    assert await known(plane) == []
    with pytest.raises(Conflict, match="declare a new one"):
        await change_maintenance(plane.engine, window, {"reason": "x"}, actor=SYSTEM, now=plane.now)
    actions = [row.action.removesuffix("_maintenance") for row in await plane.rows(audit, audit.c.id)]
    assert actions == ["create", "create", "change", "delete", "end"]


async def test_labels_cover_the_nodes_that_have_them_then(plane: ControlPlane) -> None:
    await plane.add_nodes(1, labels={"rack": "r0", "row": "a"})
    await plane.add_nodes(1, labels={"rack": "r1", "row": "a"})
    await declare(plane, start_s=100, lasts_s=50, nodes=["node-0"], labels={"rack": "r1"})
    assert await known(plane) == [({"node-0", "node-1"}, 100, 150)]
    await plane.add_nodes(1, labels={"rack": "r1", "row": "b"})
    assert await known(plane) == [({"node-0", "node-1", "node-2"}, 100, 150)]
    plane.change_node("node-1", labels={"rack": "r2"})
    await plane.send_inventory()
    assert await known(plane) == [({"node-0", "node-2"}, 100, 150)]


async def test_only_a_change_is_told(plane: ControlPlane) -> None:
    """The planner loads all anew for another set of windows."""
    await plane.add_nodes(1)
    await declare(plane, start_s=100, nodes=["node-0"])
    async with reading(plane.engine) as conn:
        _, cursor = await load_snapshot(conn, plane.now, plane.policy)
        changes, _ = await load_changes(conn, cursor, plane.later(1))
    assert changes.maintenance is None
    await plane.add_nodes(1)
    async with reading(plane.engine) as conn:
        changes, _ = await load_changes(conn, cursor, plane.now)
    assert changes.maintenance is None, "nodes have changed, but none that it covers"


async def test_a_job_that_would_run_into_a_window_waits_and_says_so(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await declare(plane, start_s=600, lasts_s=300, nodes=["node-0"])
    endless, long, short = (
        await plane.submit(gpus=1),
        await plane.submit(gpus=1, time_limit=601),
        await plane.submit(gpus=1, time_limit=600),
    )
    await plane.tick()
    assert [await plane.state(job) for job in (endless, long, short)] == ["queued", "queued", "starting"]
    for job, words in ((endless, "without a time limit"), (long, "with 10 min 01 s of its time limit left")):
        row = await hold_of(plane, job)
        assert row.reason == "maintenance" and words in row.message
        assert row.estimated_start == plane.now + timedelta(seconds=900), "the end of the window"


async def test_what_is_left_of_a_limit_decides_whether_a_job_fits_before_a_window(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(gpus=4, time_limit=600)
    plane.later(500)
    await plane.report(plane.ended(attempt, None))  # nobody saw how: it is queued again
    plane.later(60)
    await declare(plane, start_s=100, nodes=["node-0"])
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def test_at_its_start_what_runs_is_stopped_for_maintenance_and_goes_on_afterwards(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    jobs = {name: await plane.run(gpus=4) for name in ("one", "other")}
    (stays, _), (goes, attempt) = jobs["one"], jobs["other"]
    (place,) = await plane.placements(goes)
    window = await declare(plane, start_s=100, lasts_s=300, nodes=[place.node])
    await plane.tick()
    plane.later(99)
    await plane.tick()
    assert await plane.state(goes) == "running", "a window that is ahead puts nobody out"
    plane.later(1)
    await plane.tick()
    stopping = await plane.attempt(goes)
    assert (stopping.state, stopping.stop_cause, stopping.stop_reason) == ("stopping", "drain", "maintenance")
    assert await plane.state(stays) == "running"
    wanted = {each.attempt_id: each for each in (await plane.desired()).attempts}
    assert wanted[f"att_{attempt.id.hex}"].action == "stop", "the agent is told"
    await plane.report(plane.ended(attempt, 143))
    await plane.tick()
    job, hold = await plane.job(goes), await hold_of(plane, goes)
    assert (job.state, job.reason, hold.reason) == ("queued", "drained", "maintenance")
    assert "maintenance" in job.message
    await end_maintenance(plane.engine, window, actor=SYSTEM, now=plane.later(10))
    await plane.tick()
    assert await plane.state(goes) == "starting"


async def test_a_job_in_its_minimum_run_time_stays_until_that_is_over(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run(gpus=4, preemption={"min_runtime": "200s"})
    await declare(plane, start_s=100, nodes=["node-0"])
    plane.later(199)
    await plane.tick()
    assert await plane.state(job_id) == "running"
    plane.later(1)
    await plane.tick()
    assert await plane.state(job_id) == "stopping"


async def test_windows_that_were_over_long_ago_are_forgotten(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    for start_s in (10, 90_000):
        await declare(plane, start_s=start_s, lasts_s=10, nodes=["node-0"])
    day = timedelta(days=1)
    files = {"files": LogFiles("memory://"), "bundles": BundleFiles("memory://"), "outputs": OutputFiles("memory://")}
    retain = Retain(plane.engine, plane.leader, keep=Keep(metrics=day, events=day, logs=day), **files)  # type: ignore[arg-type]
    await retain.tick(plane.later(86_400 + 60))
    assert [row.starts_at < plane.now - day for row in await plane.rows(maintenance)] == [False]
