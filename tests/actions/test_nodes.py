"""Nodes: inventory, tokens, loss and return, cordon and drain."""

from __future__ import annotations

import hashlib
from datetime import timedelta

import pytest
from control_plane import FENCE_S, GIB, LOSS_GRACE_S, ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Invalid, NotFound, Superseded
from phalanx_server.domain.node import NodeState
from phalanx_server.store import ids
from phalanx_server.store.schema import audit, events, nodes, placements, tokens

CERTAIN_S = FENCE_S + LOSS_GRACE_S


async def set_state(plane: ControlPlane, name: str, wanted: NodeState) -> None:
    node_id = (await plane.node(name)).id
    await set_node_state(plane.engine, node_id, wanted=wanted, actor=SYSTEM, now=plane.now)


# ------------------------------------------------------------------ inventory


async def test_an_inventory_makes_nodes_and_gives_each_its_token_once(plane: ControlPlane) -> None:
    plane.facts = {}
    await plane.add_nodes(2, labels={"rack": "r0"})
    node = await plane.node("node-0")
    assert (node.gpus, node.cpus, node.memory_bytes, node.labels) == (4, 16, 64 * GIB, {"rack": "r0"})
    answer = await plane.send_inventory()
    assert answer.node_tokens == {}
    assert answer.node_ids["node-0"] == ids.encode("node", node.id)
    assert len(await plane.rows(tokens)) == 2
    assert [row.kind for row in await plane.rows(events)] == ["node_joined"] * 2


async def test_a_token_is_stored_as_a_hash_and_serves_its_node(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    answer = await plane.send_inventory("agent-2")
    _, token_id, secret = answer.node_tokens["node-0"].split("_", 2)
    row = next(row for row in await plane.rows(tokens) if row.id.hex == token_id)
    assert row.hash == hashlib.sha256(secret.encode()).digest()
    assert (row.kind, row.role, row.cluster_id, row.node_id) == (
        "node",
        "node",
        plane.cluster_id,
        (await plane.node("node-0")).id,
    )


async def test_a_new_agent_and_a_restarted_node_get_new_tokens_and_the_old_one_runs_out(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    assert set((await plane.send_inventory("agent-2")).node_tokens) == {"node-0", "node-1"}
    await plane.heartbeat("node-0")
    plane.change_node("node-1", ray_node_id="ray-again")
    assert set((await plane.send_inventory("agent-2")).node_tokens) == {"node-1"}
    expiring = [row for row in await plane.rows(tokens) if row.expires_at]
    assert len(expiring) == 3
    assert all(row.expires_at > plane.now for row in expiring)


async def test_a_node_that_came_back_has_not_said_its_statistics_yet(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.heartbeat("node-0")
    plane.change_node("node-0", cpus=99)
    await plane.send_inventory()
    assert (await plane.node("node-0")).stats is not None
    plane.change_node("node-0", ray_node_id="ray-again")
    await plane.send_inventory()
    assert (await plane.node("node-0")).stats is None


async def test_a_token_that_never_arrived_is_minted_again_though_the_runner_is_heard(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    plane.later(1)
    assert set((await plane.send_inventory("agent-2")).node_tokens) == {"node-0"}
    await plane.heartbeat("node-0")  # with the token that runs out
    assert (await plane.send_inventory("agent-2")).node_tokens == {}
    assert set((await plane.send_inventory("agent-2", without_token=("node-0",))).node_tokens) == {"node-0"}
    assert (await plane.send_inventory("agent-2")).node_tokens == {}


async def test_a_replaced_agent_never_takes_over_again(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.send_inventory("agent-2")
    for _ in range(2):
        with pytest.raises(Superseded):
            await plane.send_inventory("agent-1")
    await plane.send_inventory("agent-2")


async def test_a_node_that_is_not_listed_is_not_alive_and_comes_back(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    kept = plane.facts.pop("node-1")
    await plane.send_inventory()
    assert not (await plane.node("node-1")).alive
    plane.facts["node-1"] = kept
    await plane.send_inventory()
    assert (await plane.node("node-1")).alive
    assert len(await plane.rows(nodes)) == 2


async def test_an_inventory_without_news_touches_nothing_that_the_pass_reads(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    before = (await plane.node("node-0")).changed_xid
    plane.later(2)
    await plane.send_inventory()
    await plane.heartbeat("node-0")
    assert (await plane.node("node-0")).changed_xid == before


async def test_two_nodes_of_one_name_are_refused(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    plane.change_node("node-1", name="node-0")
    with pytest.raises(Invalid):
        await plane.send_inventory()


# ------------------------------------------------------------------ loss


async def test_a_lost_nodes_job_waits_for_the_fence_then_runs_elsewhere(plane: ControlPlane) -> None:
    await plane.add_nodes(3)
    job_id, attempt = await plane.run(replicas=2, gpus=4)
    assert [p.node for p in await plane.placements(job_id)] == ["node-0", "node-1"]
    plane.later(10)
    loss = await plane.lose("node-1")
    assert loss is not None and loss.jobs == (job_id,)
    job, lost = await plane.job(job_id), await plane.attempt(job_id)
    assert (lost.state, lost.outcome, lost.ended_at, lost.released_at) == ("lost", "node_lost", plane.now, None)
    assert (job.state, job.failures, job.reason) == ("queued", 0, "node_lost")
    assert job.backoff_until == plane.now + timedelta(seconds=CERTAIN_S)
    assert (await plane.desired()).attempts == []
    assert all(p.released_at is None for p in await plane.placements(job_id)), "nothing is confirmed gone yet"
    assert await plane.lose("node-1") is None

    await plane.report(plane.fact(attempt, "gone", node="node-0"))
    assert [p.released_at for p in await plane.placements(job_id)] == [plane.now, None]
    await plane.tick()
    assert await plane.state(job_id) == "queued"

    plane.later(CERTAIN_S)
    await plane.tick()
    second = await plane.attempt(job_id)
    assert (second.number, second.epoch) == (2, 2)
    assert {p.node for p in await plane.placements(job_id)} == {"node-0", "node-2"}
    assert [r.reason for r in await plane.report(plane.ended(attempt, *[0] * 8))] == ["stale_epoch"]


async def test_a_job_starts_as_soon_as_its_death_is_certain(plane: ControlPlane) -> None:
    await plane.add_nodes(3)
    job_id, attempt = await plane.run(replicas=2, gpus=4)
    await plane.lose("node-1")
    plane.later(1)
    await plane.report(*(plane.fact(attempt, "gone", node=name) for name in ("node-0", "node-1")))
    assert (await plane.attempt(job_id)).released_at == plane.now
    await plane.tick()
    assert await plane.state(job_id) == "starting"


async def test_an_eager_job_does_not_wait(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, _ = await plane.run(restart="eager")
    lost = (await plane.placements(job_id))[0].node
    await plane.lose(lost)
    await plane.tick()
    assert (await plane.attempt(job_id)).number == 2
    assert [p.node for p in await plane.placements(job_id)] == [({"node-0", "node-1"} - {lost}).pop()]


async def test_what_a_lost_attempt_holds_on_live_nodes_is_not_given_away(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    gang, attempt = await plane.run(replicas=2, gpus=4)
    waiting = await plane.submit(gpus=4)
    await plane.lose("node-1")
    await plane.tick()
    assert await plane.state(waiting) == "queued"
    await plane.report(plane.fact(attempt, "gone", node="node-0"))
    await plane.tick()
    assert await plane.state(waiting) == "starting"
    assert await plane.state(gang) == "queued"


async def test_a_lost_node_is_back_when_it_is_alive_heard_and_empty(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    plane.change_node("node-0", alive=False)
    await plane.send_inventory()
    await plane.lose("node-0")
    plane.later(30)
    plane.change_node("node-0", alive=True, ray_node_id="ray-again")
    assert set((await plane.send_inventory()).node_tokens) == {"node-0"}
    assert (await plane.node("node-0")).state == "lost"
    await plane.heartbeat("node-0", attempt, boot="again")
    assert (await plane.node("node-0")).state == "lost", "its runner still lists the old attempt"
    await plane.heartbeat("node-0", boot="again")
    node = await plane.node("node-0")
    assert (node.state, node.lost_at) == ("ready", None)
    assert (await plane.attempt(job_id)).released_at == plane.now
    await plane.tick()
    assert (await plane.attempt(job_id)).number == 2, "its old ranks are certainly gone: no need to wait"
    assert [row.kind for row in await plane.rows(events, events.c.id) if row.node_id][-1] == "node_back"


async def test_a_heartbeat_that_was_long_on_its_way_proves_nothing(plane: ControlPlane) -> None:
    """It was sent before the attempt had ranks there, and is the first to come through since."""
    await plane.add_nodes(1)
    job_id, _ = await plane.run()
    await plane.lose("node-0")
    plane.later(17)
    await plane.heartbeat("node-0", skew_s=-20)
    assert (await plane.attempt(job_id)).released_at is None
    plane.later(1)
    await plane.heartbeat("node-0")
    assert (await plane.attempt(job_id)).released_at == plane.now


async def test_a_clock_that_was_put_back_is_believed_the_second_time(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run()
    await plane.lose("node-0")
    plane.later(17)
    for released in (False, True):
        await plane.heartbeat("node-0", skew_s=-3600)
        assert ((await plane.attempt(job_id)).released_at is not None) == released


async def test_a_heartbeat_right_after_the_loss_proves_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run()
    await plane.lose("node-0")
    plane.later(1)
    await plane.heartbeat("node-0")
    assert (await plane.attempt(job_id)).released_at is None


async def test_a_cancelled_job_that_is_lost_is_cancelled(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run()
    await cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await plane.lose("node-0")
    assert await plane.state(job_id) == "cancelled"
    assert (await plane.attempt(job_id)).state == "lost"


async def test_a_node_is_lost_with_every_job_on_it_and_no_other(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=2)
    jobs = [(await plane.run(gpus=1))[0] for _ in range(4)]
    on_first = {job for job in jobs if (await plane.placements(job))[0].node == "node-0"}
    await plane.lose("node-0")
    assert {job for job in jobs if await plane.state(job) == "queued"} == on_first
    assert len(on_first) == 2


# ------------------------------------------------------------------ cordon, drain


async def test_a_cordoned_node_keeps_what_it_has(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    running, _ = await plane.run()
    await set_state(plane, "node-0", NodeState.CORDONED)
    waiting = await plane.submit()
    await plane.tick()
    assert (await plane.state(running), await plane.state(waiting)) == ("running", "queued")
    await set_state(plane, "node-0", NodeState.READY)
    await plane.tick()
    assert await plane.state(waiting) == "starting"
    assert [row.action for row in await plane.rows(audit, audit.c.id)] == ["node.cordoned", "node.ready"]


async def test_a_draining_nodes_preemptible_jobs_move(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    moves, attempt = await plane.run()
    name = (await plane.placements(moves))[0].node
    stays, _ = await plane.run(preemption={"preemptible": False})
    assert (await plane.placements(stays))[0].node == name
    blocks = [await plane.submit(gpus=4)]
    await plane.tick()
    plane.later(1)
    await set_state(plane, name, NodeState.DRAINING)
    await plane.tick()
    assert await plane.state(moves) == "running", "there is no room elsewhere"
    await plane.report(plane.ended(await plane.start(blocks[0]), 0))
    await plane.tick()
    assert (await plane.state(moves), await plane.state(stays)) == ("stopping", "running")
    await plane.report(plane.ended(attempt, 0))
    assert (await plane.attempt(moves)).outcome == "migrated"
    await plane.tick()
    assert (await plane.placements(moves))[0].node != name
    assert (await plane.job(moves)).failures == 0
    await plane.tick()
    assert await plane.state(stays) == "running"


async def test_a_lost_node_comes_back_as_an_operator_wants_it(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.lose("node-0")
    await set_state(plane, "node-0", NodeState.CORDONED)
    assert (await plane.node("node-0")).state == "lost"
    plane.later(1)
    await plane.heartbeat("node-0")
    await plane.send_inventory()
    assert (await plane.node("node-0")).state == "cordoned"


async def test_a_node_that_does_not_exist(plane: ControlPlane) -> None:
    with pytest.raises(NotFound):
        await set_node_state(plane.engine, plane.tenant_id, wanted=NodeState.READY, actor=SYSTEM, now=plane.now)


async def test_nothing_is_left_charged_in_the_end(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    _, attempt = await plane.run(replicas=2, gpus=4)
    await plane.lose("node-0")
    await plane.lose("node-1")
    await plane.report(*(plane.fact(attempt, "gone", node=name) for name in ("node-0", "node-1")))
    assert all(row.released_at for row in await plane.rows(placements))
