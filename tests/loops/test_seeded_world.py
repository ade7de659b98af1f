"""Seeded worlds: jobs, nodes and agents do what they like, in an order drawn by chance; what must always hold, holds.

The production code runs on a real database; only time, chance and the agent are the test's. A seed reproduces a world.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict
from phalanx_server.domain.messages import AttemptFact
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.schema import attempts, jobs, nodes, placements
from phalanx_server.store.snapshots import load_snapshot, reading
from sqlalchemy import Row, text

STEPS = 60
LIVE = {"starting", "running", "stopping"}

DOUBLE_CHARGED = text(
    """
    SELECT node_id, gpu FROM placements, unnest(gpu_indices) AS gpu WHERE released_at IS NULL
    GROUP BY node_id, gpu HAVING count(*) > 1
    """
)
BROKEN = text(
    """
    SELECT j.id FROM jobs j WHERE (j.state IN ('starting', 'running', 'stopping')) <>
        EXISTS (SELECT FROM attempts a WHERE a.job_id = j.id AND a.state IN ('starting', 'running', 'stopping'))
    UNION ALL
    SELECT a.job_id FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.state IN ('starting', 'running', 'stopping') AND a.epoch <> j.epoch
    UNION ALL
    SELECT a.job_id FROM attempts a WHERE (a.released_at IS NULL) <>
        EXISTS (SELECT FROM placements p WHERE p.attempt_id = a.id AND p.released_at IS NULL)
    UNION ALL
    SELECT a.job_id FROM attempts a JOIN placements p ON p.attempt_id = a.id GROUP BY a.id
    HAVING sum(p.replicas) <> a.replicas
    UNION ALL
    SELECT h.job_id FROM holds h JOIN jobs j ON j.id = h.job_id WHERE j.state <> 'queued'
    """
)


class World:
    """A control plane and the dice."""

    def __init__(self, plane: ControlPlane, seed: int) -> None:
        self.plane = plane
        self.dice = random.Random(seed)
        self.sent: list[AttemptFact] = []

    async def step(self) -> None:
        deeds = [self.submit, self.submit, self.facts, self.facts, self.facts, self.resend, self.meddle, self.node]
        self.plane.later(self.dice.choice([0.5, 5, 40]))
        self.plane.silent = self.dice.random() < 0.2
        await self.dice.choice(deeds)()
        await self.plane.tick()
        await self.check()

    async def submit(self) -> None:
        dice = self.dice
        retries = {"max": dice.choice([0, 2]), "backoff": dice.choice([0, 20])}
        restart = dice.choice(["fenced", "fenced", "eager"])
        await self.plane.submit(
            replicas=dice.choice([1, 1, 2, 3]), gpus=dice.choice([0, 1, 2, 4]), retries=retries, restart=restart
        )

    async def facts(self) -> None:
        """The agent tells the next thing of a few attempts."""
        for attempt in self.dice.sample(rows := await self.of("attempts"), min(3, len(rows))):
            for fact in await self.next_facts(attempt):
                self.sent.append(fact)
                await self.plane.report(fact)

    async def next_facts(self, attempt: Row[Any]) -> list[AttemptFact]:
        plane, dice = self.plane, self.dice
        if attempt.state == "lost":
            places = [p for p in await self.of("placements") if p.attempt_id == attempt.id]
            names = {node.id: node.name for node in await self.of("nodes")}
            return [plane.fact(attempt, "gone", node=names[dice.choice(places).node_id])]
        if attempt.state == "starting" and dice.random() < 0.7:
            kinds = dice.choice([["gang_ready"], ["gang_ready", "started"], ["start_failed"]])
            return [plane.fact(attempt, kind, message="no luck") for kind in kinds]
        if attempt.state in LIVE:
            return [plane.ended(attempt, dice.choice([0, 1, None]))]
        return []

    async def resend(self) -> None:
        """The network repeats itself."""
        if self.sent:
            await self.plane.report(*self.dice.sample(self.sent, min(4, len(self.sent))))

    async def meddle(self) -> None:
        """A user changes their mind."""
        rows = await self.of("jobs")
        if rows:
            job: UUID = self.dice.choice(rows).id
            deed = self.dice.choice([cancel_job, hold_job, release_job, release_job])
            with contextlib.suppress(Conflict):  # it is over already, or not waiting
                await deed(self.plane.engine, job, actor=SYSTEM, now=self.plane.now)

    async def node(self) -> None:
        """A node is lost, or all that are lost are restarted, with nothing on them."""
        name = self.dice.choice(sorted(self.plane.facts))
        if (await self.plane.node(name)).state != "lost" and self.dice.random() < 0.5:
            await self.plane.lose(name)
            return
        self.plane.later(15)
        for row in await self.of("nodes"):
            if row.state == "lost":
                await self.plane.heartbeat(row.name, boot=f"boot-{self.plane.now.timestamp():.0f}")
        await self.plane.send_inventory()

    async def of(self, table: str) -> list[Row[Any]]:
        order = {"attempts": attempts, "jobs": jobs, "nodes": nodes, "placements": placements}[table]
        return sorted(await self.plane.rows(order), key=lambda row: (str(row[0]), str(row[1])))

    async def check(self) -> None:
        async with self.plane.engine.connect() as conn:
            assert list(await conn.execute(DOUBLE_CHARGED)) == []
            assert list(await conn.execute(BROKEN)) == []
        memory = self.plane.scheduler._memory
        if memory is not None and self.dice.random() < 0.2:
            await self.plane.tick()
            await self.compare()

    async def compare(self) -> None:
        """The planner in memory knows what a fresh load would say."""
        memory = self.plane.scheduler._memory
        assert memory is not None
        async with reading(self.plane.engine) as conn:
            fresh, cursor = await load_snapshot(conn, self.plane.now, Policy())
        known = memory.planner.snapshot()
        stale = {job.id for job in fresh.jobs if job.state != "queued"} - {
            j.id for j in known.jobs if j.state != "queued"
        }
        if stale:
            return  # the last pass has just started something; the next one reads it
        assert {job.id: job for job in known.jobs} == {job.id: job for job in fresh.jobs}
        assert {node.name: node for node in known.nodes} == {node.name: node for node in fresh.nodes}
        assert dict(memory.cursor.versions) == dict(cursor.versions)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_happens_the_books_balance(plane: ControlPlane, seed: int) -> None:
    await plane.add_nodes(3)
    world = World(plane, seed)
    for _ in range(STEPS):
        await world.step()


async def test_a_world_left_alone_finishes_its_work(plane: ControlPlane) -> None:
    """After any mess: with all nodes back and an agent that reports, every job that is not on hold ends."""
    await plane.add_nodes(3)
    world = World(plane, 4)
    for _ in range(30):
        await world.step()
    plane.silent = False
    for row in await world.of("jobs"):
        if row.state == "queued" and row.held:
            await release_job(plane.engine, row.id, actor=SYSTEM, now=plane.now)
    for _ in range(60):
        plane.later(100)
        for row in await world.of("nodes"):
            await plane.heartbeat(row.name, boot=f"boot-{plane.now.timestamp():.0f}")
        await plane.send_inventory()
        await plane.tick()
        live = [row for row in await world.of("attempts") if row.state in LIVE]
        await plane.report(*(plane.ended(attempt, 0) for attempt in live))
        if {row.state for row in await world.of("jobs")} <= {"succeeded", "failed", "cancelled"}:
            break
    left = {row.id: (row.state, row.reason) for row in await world.of("jobs") if row.finished_at is None}
    possible = {i: state for i, state in left.items() if await _reason(plane, i) != "impossible"}
    assert possible == {}


async def _reason(plane: ControlPlane, job_id: UUID) -> str | None:
    async with plane.engine.connect() as conn:
        query = text("SELECT reason FROM holds WHERE job_id = :id")
        return (await conn.execute(query, {"id": job_id})).scalar_one_or_none()
