"""The policy as it is set while a scheduler leads; what of a job file only the pass acts upon."""

from __future__ import annotations

from datetime import timedelta

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.set_policy import set_policy
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict, EtagMismatch, Invalid
from phalanx_server.scheduling.snapshot import Policy, Slice, Snapshot, Topology
from phalanx_server.store.policies import load_policy, write_policy
from phalanx_server.store.schema import audit
from phalanx_server.store.snapshots import load_snapshot, reading
from structlog.testing import capture_logs


async def fresh(plane: ControlPlane) -> Snapshot:
    async with reading(plane.engine) as conn:
        return (await load_snapshot(conn, plane.now, plane.policy))[0]


async def in_force(plane: ControlPlane) -> Policy:
    """The policy that the scheduler has in memory after a pass, which is the one that another would load."""
    await plane.tick()
    assert plane.scheduler._memory is not None
    live = plane.scheduler._memory.planner.snapshot().policy
    assert (await fresh(plane)).policy == live
    return live


async def test_the_next_pass_follows_what_was_set_over_the_settings_file(plane: ControlPlane) -> None:
    plane.policy = Policy(restart_s=7, order="shortest")
    plane.scheduler._policy = plane.policy
    assert await in_force(plane) == plane.policy
    settings = {"order": "fifo", "default_time_limit_s": 60}
    await set_policy(plane.engine, settings, base=plane.policy, if_version=1, actor=SYSTEM)
    assert await in_force(plane) == Policy(restart_s=7, order="fifo", default_time_limit_s=60)
    await set_policy(plane.engine, {}, base=plane.policy, if_version=2, actor=SYSTEM)
    assert await in_force(plane) == plane.policy
    assert [row.action for row in await plane.rows(audit)] == ["set_policy"] * 2


async def test_a_policy_that_somebody_else_changed_or_that_cannot_be_is_refused(plane: ControlPlane) -> None:
    with pytest.raises(EtagMismatch):
        await set_policy(plane.engine, {}, base=Policy(), if_version=7, actor=SYSTEM)
    with pytest.raises(Invalid, match="restart_s"):
        await set_policy(plane.engine, {"restart_s": -1}, base=Policy(), if_version=None, actor=SYSTEM)
    async with plane.engine.connect() as conn:
        assert (await load_policy(conn)).version == 1


async def test_topology_range_and_deadline_reach_the_pass_by_both_ways(plane: ControlPlane) -> None:
    await plane.add_nodes(2, gpus=4, labels={"rack": "r0"})
    levels = {"topology_levels": ["rack"]}
    await set_policy(plane.engine, levels, base=plane.policy, if_version=None, actor=SYSTEM)
    await plane.tick()
    deadline = plane.now + timedelta(hours=1)
    resources = {
        "gpus": 4,
        "elastic": {"min_replicas": 2, "max_replicas": 8},
        "topology": {"preferred": "rack", "slice": {"level": "node", "replicas": 2}},
    }
    shaped = (await plane.submit_file(resources=resources, deadline=deadline.isoformat(), held=True)).jobs[0].id
    await plane.tick()
    job = (await plane.known_jobs())[shaped.hex]
    assert job.topology == Topology(preferred="rack", slice=Slice(level="node", replicas=2))
    assert (job.replicas, job.min_replicas, job.max_replicas, job.deadline) == (4, 2, 8, deadline.timestamp())
    assert {node.labels["rack"] for node in (await fresh(plane)).nodes} == {"r0"}


async def test_a_level_stays_while_a_job_names_it(plane: ControlPlane) -> None:
    base = Policy(topology_levels=("block", "rack"))
    plane.policy = base
    resources = {"gpus": 2, "topology": {"required": "block", "slice": {"level": "rack", "replicas": 1}}}
    await plane.submit_file(resources=resources)
    for levels in ([], ["block"], ["rack"]):
        with pytest.raises(Conflict, match="names the level"):
            await set_policy(plane.engine, {"topology_levels": levels}, base=base, if_version=None, actor=SYSTEM)
    wider = {"topology_levels": ["zone", "block", "rack"]}
    await set_policy(plane.engine, wider, base=base, if_version=None, actor=SYSTEM)


async def test_what_a_newer_version_stored_is_passed_over_in_a_pass_and_refused_in_a_change(
    plane: ControlPlane,
) -> None:
    settings = {"order": "fifo", "of_next_year": {"a": 1}, "restart_s": "as the moon says"}
    async with plane.engine.begin() as conn:
        await write_policy(conn, settings)
    with capture_logs() as logs:
        assert await in_force(plane) == Policy(order="fifo")
        await plane.tick()
    said = [entry["field"] for entry in logs if "passed over" in entry["event"]]
    assert sorted(said) == ["of_next_year", "restart_s"], "each once"
    with pytest.raises(Invalid, match="of_next_year"):
        await set_policy(plane.engine, {"of_next_year": 1}, base=Policy(), if_version=None, actor=SYSTEM)
    await set_policy(plane.engine, {"order": "shortest"}, base=Policy(), if_version=None, actor=SYSTEM)
    assert await in_force(plane) == Policy(order="shortest")
