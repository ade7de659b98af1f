"""What tenants have used reaches the pass: under fair sharing only, decayed, the same by both ways."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from control_plane import ControlPlane
from phalanx_server.api.what_if import WhatIf
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Policy, Tenant
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import tenants
from phalanx_server.store.snapshots import load_changes, load_snapshot, reading
from phalanx_server.store.usage import STEP_MIN_S, usage_moment
from sqlalchemy import event, insert, text, update

HALF_LIFE_S = 60_000.0
FAIR = Policy(fair_sharing=True, usage_half_life_s=HALF_LIFE_S)


@pytest.fixture
async def fair(plane: ControlPlane) -> ControlPlane:
    plane.policy = FAIR
    plane.scheduler = ScheduleLoop(plane.engine, plane.leader, policy=FAIR)
    await plane.add_nodes(1)
    return plane


async def fresh(plane: ControlPlane) -> tuple[Tenant, ...]:
    async with reading(plane.engine) as conn:
        return (await load_snapshot(conn, plane.now, plane.policy))[0].tenants


def known(plane: ControlPlane) -> tuple[Tenant, ...]:
    memory = plane.scheduler._memory
    assert memory is not None
    return memory.planner.snapshot().tenants


async def test_use_grows_while_a_job_runs_and_decays_afterwards(fair: ControlPlane) -> None:
    _, attempt = await fair.run(gpus=4)
    seen = []
    for _ in range(3):
        fair.later(HALF_LIFE_S)
        await fair.tick()
        assert known(fair) == await fresh(fair), "what changes say is what a fresh load says"
        seen.append(known(fair)[0].usage["h100"])
    # The integral of 4 GPUs x 2^(-t/h): 4 h/ln 2 x (1 - 2^-n) after n half-lives.
    assert seen == pytest.approx([4 * HALF_LIFE_S / 0.693147 * (1 - 0.5**n) for n in (1, 2, 3)], rel=1e-3)
    await fair.report(fair.ended(attempt, 0))
    fair.later(HALF_LIFE_S)
    await fair.tick()
    assert known(fair) == await fresh(fair)
    assert known(fair)[0].usage["h100"] == pytest.approx(seen[-1] / 2, rel=1e-3)


async def test_it_is_summed_up_on_a_grid_of_time_only(fair: ControlPlane) -> None:
    await fair.run(gpus=4)
    fair.later(2 * STEP_MIN_S - fair.now.timestamp() % STEP_MIN_S)
    async with reading(fair.engine) as conn:
        _, cursor = await load_snapshot(conn, fair.now, FAIR)
        soon, _ = await load_changes(conn, cursor, fair.later(STEP_MIN_S - 1))
        later, _ = await load_changes(conn, cursor, fair.later(1))
    assert soon.tenants is None and later.tenants is not None


@contextmanager
def sums(plane: ControlPlane) -> Iterator[list[str]]:
    """The statements that sum up past use while this is open."""
    seen: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "till_ago" in statement:
            seen.append(statement)

    event.listen(plane.engine.sync_engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(plane.engine.sync_engine, "before_cursor_execute", note)


async def test_for_one_moment_it_is_summed_up_once_whoever_asks(fair: ControlPlane) -> None:
    await fair.run(gpus=4)
    fair.later(2 * STEP_MIN_S - fair.now.timestamp() % STEP_MIN_S)
    questions = WhatIf(fair.engine, FAIR)
    with sums(fair) as seen:
        await fair.tick()
        assert len(seen) == 1
        async with fair.engine.connect() as holding, holding.begin():
            await holding.execute(text("SELECT pg_current_xact_id()"))
            for weight in (2.0, 3.0):
                async with fair.engine.begin() as conn:
                    await conn.execute(update(tenants).values(weight=weight))
                await fair.tick()
                assert known(fair)[0].weight == weight and known(fair)[0].usage, "what was summed up goes with it"
            await fair.tick()
        fair.scheduler._memory = None
        await fair.tick()
        assert len(seen) == 1, "nor after a fresh load"
        fair.later(STEP_MIN_S)
        await fair.tick()
        assert len(seen) == 2 and known(fair) == await fresh(fair)
    with sums(fair) as seen:
        before = usage_moment(time.time(), FAIR)
        for _ in range(3):
            questions._loaded_at = -math.inf
            await questions.with_jobs([])
        assert 1 <= len(seen) <= 1 + (usage_moment(time.time(), FAIR) != before)


async def test_what_was_released_within_reach_is_found_by_an_index(fair: ControlPlane) -> None:
    await fair.run(gpus=4)
    with sums(fair) as seen:
        await fresh(fair)
    query = re.sub(r"%\((\w+)\)s(::\w+)?|\$(\d+)(::\w+)?", "1000", seen[0])
    async with fair.engine.begin() as conn:
        for setting in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
            await conn.execute(text(f"SET LOCAL {setting} = off"))
        plan = "\n".join((await conn.execute(text(f"EXPLAIN {query}".replace(":", "\\:")))).scalars())
    assert "placements_released" in plan and "placements_charged" in plan and "Seq Scan on placements" not in plan


async def test_without_fair_sharing_nothing_is_summed_up(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    await plane.run(gpus=4)
    plane.later(3600)
    await plane.tick()
    assert usage_moment(plane.now.timestamp(), Policy()) is None
    assert [tenant.usage for tenant in known(plane)] == [{}] == [tenant.usage for tenant in await fresh(plane)]


async def test_another_half_life_is_another_sum(fair: ControlPlane) -> None:
    moments = [
        usage_moment(fair.now.timestamp(), replace(FAIR, usage_half_life_s=half_life_s)) for half_life_s in (1e3, 2e3)
    ]
    assert moments[0] != moments[1]


async def test_who_has_used_less_goes_first(fair: ControlPlane) -> None:
    one, other = new_id(), new_id()
    async with fair.engine.begin() as conn:
        for id_, path in ((one, "default/one"), (other, "default/other")):
            await conn.execute(insert(tenants).values(id=id_, path=path, parent_id=fair.tenant_id))
    _, attempt = await fair.run(gpus=4, tenant_id=one)
    fair.later(500)
    await fair.submit(gpus=4, tenant_id=one)
    theirs = await fair.submit(gpus=4, tenant_id=other)
    await fair.tick()
    assert {tenant.name: bool(tenant.usage) for tenant in known(fair)} == {
        "default": False,
        "default/one": True,
        "default/other": False,
    }
    await fair.report(fair.ended(attempt, 0))
    await fair.tick()
    assert await fair.state(theirs) == "starting", "submitted later, of a tenant that had nothing"
