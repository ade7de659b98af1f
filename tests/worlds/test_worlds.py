"""Whatever happens, what must hold does; and when the faults end, every job ends. A seed reproduces its world.

`make test` lives a few worlds, `make test-slow` a hundred, `make worlds` as many as one likes:

    WORLDS=5000 FIRST_SEED=1 make worlds
"""

from __future__ import annotations

import os

import pytest
from control_plane import ControlPlane
from network import Away
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.domain import messages as m
from phalanx_server.domain.access import SYSTEM
from phalanx_server.store import ids
from phalanx_server.store.schema import events
from world import World, seeded_ids

STEPS = 60
FIRST, COUNT = int(os.environ.get("FIRST_SEED", "1000")), int(os.environ.get("WORLDS", "100"))


async def live(plane: ControlPlane, seed: int) -> World:
    with seeded_ids(plane, seed):
        world = await World(plane, seed).open()
        await world.run(STEPS)
    return world


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_world(plane: ControlPlane, seed: int) -> None:
    await live(plane, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
async def test_one_of_many_worlds(plane: ControlPlane, seed: int) -> None:
    await live(plane, seed)


async def history(plane: ControlPlane, seed: int) -> list[tuple[object, ...]]:
    await live(plane, seed)
    return [
        (row.at, row.kind, row.job_id, row.attempt_id, row.message) for row in await plane.rows(events, events.c.id)
    ]


@pytest.mark.slow
async def test_a_seed_reproduces_its_world(plane: ControlPlane, other_plane: ControlPlane) -> None:
    assert await history(plane, 4) == await history(other_plane, 4)


async def test_what_a_dead_agent_had_prepared_is_cleared_by_the_next(plane: ControlPlane) -> None:
    """Its attempt is lost meanwhile, so nobody wants it, but its runner lists it: its GPUs would stay charged."""
    with seeded_ids(plane, 5):
        world = await World(plane, 5).open()
        world.network.faults = False
        run = {"command": "python t.py", "environment": {"requirements": ["numpy"]}}
        for _ in range(3):
            await plane.submit(run=run, tenant_id=world.tenants[0])
        preparing: list[str] = []
        while not preparing:
            assert world.steps < 100, "nothing was ever prepared: another seed may do"
            await world.step(1.0, trouble=False)
            machines = world.cluster.machines.values()
            preparing = [each.name for each in machines if each.runner is not None and each.runner.prepared]
        world.agent, world.agent_back_at_s = None, world.now_s + 2.0
        await plane.lose(preparing[0])
        await world.settle()


@pytest.mark.parametrize("seed", [6, 8])
async def test_the_next_agent_ends_no_attempt_that_a_dead_one_left_starting(plane: ControlPlane, seed: int) -> None:
    """It is cancelled meanwhile, and nobody hears the server's answer to its end: what that freed must be free."""
    with seeded_ids(plane, seed):
        world = await World(plane, seed).open()
        world.network.faults = False
        for _ in range(3):
            await plane.submit(replicas=2, gpus=world.cluster.machines["node-0"].gpus, tenant_id=world.tenants[0])
        starting = []
        while not starting:
            assert world.steps < 300, "no start took long enough: another seed may do"
            if world.steps % 20 == 0:
                await plane.submit(replicas=2, gpus=1, tenant_id=world.tenants[0])
            await world.step(0.5, trouble=False)
            starting = [each for machine in world.cluster.machines.values() for each in machine.starting()]
        world.agent, world.agent_back_at_s = None, world.now_s + 1.0
        await cancel_job(plane.engine, ids.parse("job", starting[0].attempt.job_id), actor=SYSTEM, now=plane.now)
        hear = world._report

        async def unanswered(report: m.AgentReport) -> m.ReportAnswer:
            await hear(report)
            raise Away

        world._report = unanswered
        for _ in range(20):
            await world.step(0.5, trouble=False)
        world._report = hear
        await world.settle()
