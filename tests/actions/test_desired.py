"""What an agent is told to run."""

from __future__ import annotations

from control_plane import GIB, ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.desired import Known, desired, desired_version
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.messages import DesiredAttempt


async def version(plane: ControlPlane) -> str:
    async with plane.engine.connect() as conn:
        return await desired_version(conn, cluster_id=plane.cluster_id)


async def test_a_gang_is_described_whole(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id = await plane.submit(
        replicas=3,
        gpus=2,
        name="gpt",
        run={"command": "python -m train", "env": {"A": "1"}},
        resources={"cpus_per_gpu": 2, "memory_per_replica": "4GiB"},
        checkpoint={"url": "s3://bucket/gpt"},
        preemption={"grace": "2m"},
    )
    await plane.tick()
    (told,) = (await plane.desired()).attempts
    assert (told.job_name, told.tenant, told.number, told.epoch, told.action) == ("gpt", "default", 1, 1, "run")
    assert (told.grace_s, told.started, told.tenant_uid >= 71000) == (120.0, False, True)
    assert [(g.group_rank, g.first_rank, g.ranks, g.replicas) for g in told.groups] == [(0, 0, 4, 2), (1, 4, 2, 1)]
    assert [len(group.gpu_indices) for group in told.groups] == [4, 2]
    launch = told.launch
    assert (launch.command, launch.env, launch.world_size) == ("python -m train", {"A": "1"}, 6)
    assert (launch.cpus_per_group, launch.memory_bytes_per_group) == ([8.0, 4.0], [8 * GIB, 4 * GIB])
    assert (launch.checkpoint_url, launch.resume_from, launch.bundle) == ("s3://bucket/gpt", None, None)
    assert told.job_id == f"job_{job_id.hex}"


async def test_the_version_changes_with_the_answer_and_only_then(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    empty = await version(plane)
    assert (await plane.desired()).version == empty
    job_id = await plane.submit()
    assert await version(plane) == empty
    await plane.tick()
    starting = await version(plane)
    assert (await plane.desired()).version == starting != empty
    attempt = await plane.start(job_id)
    running = await version(plane)
    assert running != starting, "a new agent must learn that it ran"
    await plane.node_report("node-0", marks=[plane.mark(attempt, "first_step")])
    assert await version(plane) == running
    await plane.report(plane.ended(attempt, 0))
    assert await version(plane) == empty


async def test_what_was_told_before_is_told_as_it_is_now(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    ending, job_id = await plane.submit(), await plane.submit(name="gpt")
    await plane.tick()
    known: Known = {}
    assert await told(plane, known) == (await plane.desired()).attempts
    await plane.start(job_id)
    ended = await plane.start(ending)
    await plane.report(plane.ended(ended, 0))
    await cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await plane.submit(name="new")
    await plane.tick()
    now = await told(plane, known)
    assert now == (await plane.desired()).attempts
    assert {(each.job_name, each.action, each.started) for each in now} == {
        ("gpt", "stop", True),
        ("new", "run", False),
    }
    assert list(known[plane.cluster_id].values()) == now, "what is over is forgotten"


async def told(plane: ControlPlane, known: Known) -> list[DesiredAttempt]:
    async with plane.engine.connect() as conn:
        return (await desired(conn, cluster_id=plane.cluster_id, now=plane.now, known=known)).attempts
