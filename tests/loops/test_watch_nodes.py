"""Silence: when it counts, and when it does not."""

from __future__ import annotations

from typing import Any

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.lose_node import Loss, lose_node
from phalanx_server.loops.watch_nodes import Patience, WatchNodes

PATIENCE = Patience(node_timeout_s=20, startup_grace_s=15, fence_s=60, loss_grace_s=5)


@pytest.fixture
def watch(plane: ControlPlane) -> WatchNodes:
    return WatchNodes(plane.engine, plane.leader, PATIENCE)


async def live(plane: ControlPlane, watch: WatchNodes, seconds: int, *, silent: tuple[str, ...] = ()) -> list[str]:
    """Let time pass with an agent that is heard and runners that beat, but for those in `silent`; who was lost."""
    lost = []
    for _ in range(seconds // 5):
        plane.later(5)
        if "agent" not in silent:
            await plane.send_inventory()
        for name in plane.facts.keys() - set(silent):
            await plane.heartbeat(name)
        gone = await watch.tick(plane.now)
        lost += [name for name in plane.facts if (await plane.node(name)).id in gone]
    return lost


async def test_nobody_is_lost_while_all_are_heard(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(2)
    assert await live(plane, watch, 120) == []


async def test_a_silent_runner_is_given_up_after_the_timeout(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(2)
    job_id, _ = await plane.run(replicas=2, gpus=4)
    await live(plane, watch, 30)
    assert await live(plane, watch, 20, silent=("node-1",)) == []
    assert await live(plane, watch, 10, silent=("node-1",)) == ["node-1"]
    assert await plane.state(job_id) == "queued"


async def test_a_node_that_the_agent_calls_dead_is_given_up_at_once(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(2)
    await live(plane, watch, 30)
    plane.change_node("node-1", alive=False)
    assert await live(plane, watch, 5) == ["node-1"]


async def test_after_a_start_there_is_a_grace(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    plane.change_node("node-0", alive=False)
    assert await live(plane, watch, 15) == []
    assert await live(plane, watch, 5) == ["node-0"]


async def test_silence_does_not_count_while_nobody_listened(plane: ControlPlane, watch: WatchNodes) -> None:
    """The server was away: neither agent nor runners could be heard. When it is back, runners have time to be heard."""
    await plane.add_nodes(2)
    await live(plane, watch, 30)
    everybody = ("agent", "node-0", "node-1")
    assert await live(plane, watch, 300, silent=everybody) == []
    assert await live(plane, watch, 30, silent=("node-0", "node-1")) == []
    assert await live(plane, watch, 60) == []


async def test_nor_while_nobody_watched(plane: ControlPlane, watch: WatchNodes) -> None:
    """The database was away, or the machine slept: no tick saw the silence of the agent, which is heard first again."""
    await plane.add_nodes(2)
    await live(plane, watch, 30)
    plane.later(300)
    assert await live(plane, watch, 30, silent=("node-0", "node-1")) == []
    assert await live(plane, watch, 60) == []


async def test_a_node_that_was_heard_meanwhile_is_not_given_up(
    plane: ControlPlane, watch: WatchNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the nodes and the loss of one lies time: other nodes are given up before it."""
    await plane.add_nodes(1)
    await live(plane, watch, 30)

    async def late(*args: Any, **values: Any) -> Loss | None:
        await plane.heartbeat("node-0")
        return await lose_node(*args, **values)

    monkeypatch.setattr("phalanx_server.loops.watch_nodes.lose_node", late)
    assert await live(plane, watch, 60, silent=("node-0",)) == []
    assert (await plane.node("node-0")).state == "ready"


async def test_a_deposed_leader_gives_up_nothing(plane: ControlPlane, watch: WatchNodes) -> None:
    """Its process was stopped, and goes on after another has taken over."""
    await plane.add_nodes(1)
    await live(plane, watch, 30)
    async with plane.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE leases SET expires_at = now() - interval '1 second'")
    await plane.new_leader("scheduler-2").tick(plane.now)
    assert plane.leader.lease is not None, "it does not know yet"
    assert await live(plane, watch, 60, silent=("node-0",)) == []
    assert (await plane.node("node-0")).state == "ready"


async def test_a_deposed_leader_takes_nothing_back(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    await live(plane, watch, 30)
    await plane.lose("node-0")
    plane.later(5)
    await plane.heartbeat("node-0")
    async with plane.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE leases SET epoch = epoch + 1 WHERE name = 'scheduler'")
    assert await watch.tick(plane.now) == []
    assert (await plane.node("node-0")).state == "lost"
    await plane.leader.tick(plane.now)
    await watch.tick(plane.now)
    assert (await plane.node("node-0")).state == "ready"


async def test_a_new_agent_gets_the_grace_too(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    await live(plane, watch, 30)
    plane.instance = "agent-2"
    plane.change_node("node-0", alive=False)
    assert await live(plane, watch, 15) == []
    assert await live(plane, watch, 10) == ["node-0"]


async def test_an_absent_agent_loses_nothing_while_the_outage_is_tolerated(
    plane: ControlPlane, watch: WatchNodes
) -> None:
    await plane.add_nodes(1)
    await live(plane, watch, 30)
    plane.later(3500)
    assert await watch.tick(plane.now) == []
    plane.later(200)
    assert len(await watch.tick(plane.now)) == 1


async def test_a_node_that_never_reported_has_nothing_to_lose(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    async with plane.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE nodes SET runner_seen_at = NULL")
    assert await live(plane, watch, 120, silent=("node-0",)) == []


async def test_a_node_that_was_lost_is_taken_back(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    await live(plane, watch, 30)
    assert await live(plane, watch, 30, silent=("node-0",)) == ["node-0"]
    await plane.report(plane.fact(attempt, "gone", node="node-0"))
    assert (await plane.node("node-0")).state == "lost", "its runner was not heard yet"
    assert await live(plane, watch, 5) == []
    assert (await plane.node("node-0")).state == "ready"
    await plane.tick()
    assert (await plane.attempt(job_id)).number == 2


async def test_only_the_leader_watches(plane: ControlPlane, watch: WatchNodes) -> None:
    await plane.add_nodes(1)
    await live(plane, watch, 30)
    await plane.leader.resign()
    assert await live(plane, watch, 60, silent=("node-0",)) == []
