"""Everybody at once: scheduler, agent, runners, users and operators on one database, and nobody deadlocks.

What each does comes from a seed; how it interleaves is PostgreSQL's own. So a failure may not come back at once, but
every run must hold: no error, no GPU given twice, nothing held by what has ended.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict
from phalanx_server.domain.node import NodeState
from phalanx_server.loops.enforce import Enforce
from phalanx_server.store.schema import attempts
from sqlalchemy import Row, select

TURNS = 50

GIVEN_TWICE = """
    SELECT node_id, gpu FROM placements, unnest(gpu_indices) AS gpu WHERE released_at IS NULL
    GROUP BY node_id, gpu HAVING count(*) > 1
"""
HELD_BY_THE_DEAD = """
    SELECT a.id FROM attempts a JOIN placements p ON p.attempt_id = a.id
    WHERE a.state = 'ended' AND (p.released_at IS NULL OR a.released_at IS NULL)
"""
AT_ODDS = """
    SELECT j.id, j.state, a.state FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id
        AND a.state IN ('starting', 'running', 'stopping')
    WHERE (j.state IN ('starting', 'running', 'stopping') OR a.id IS NOT NULL) AND j.state IS DISTINCT FROM a.state
"""


class Crowd:
    """What each of them does in a turn."""

    def __init__(self, plane: ControlPlane, nodes: list[str], seed: int) -> None:
        self.plane = plane
        self.nodes = nodes
        self.rng = random.Random(seed)
        self.jobs: list[UUID] = []

    async def user(self) -> None:
        shape = {"replicas": self.rng.choice([1, 2, 3]), "gpus": self.rng.choice([1, 2])}
        limit = self.rng.choice([None, 5])
        retries = {"max": 3, "backoff": 0}
        self.jobs.append(await self.plane.submit(**shape, time_limit=limit, retries=retries, restart="eager"))

    async def canceller(self) -> None:
        with suppress(Conflict):
            await cancel_job(self.plane.engine, self._job(), actor=SYSTEM, now=self.plane.now)

    async def holder(self) -> None:
        job_id = self._job()
        with suppress(Conflict):
            await hold_job(self.plane.engine, job_id, actor=SYSTEM, now=self.plane.now)
            await release_job(self.plane.engine, job_id, actor=SYSTEM, now=self.plane.now)

    async def scheduler(self) -> None:
        await self.plane.tick()
        await Enforce(self.plane.engine, self.plane.leader, policy=self.plane.policy).tick(self.plane.now)
        self.plane.later(0.2)

    async def agent(self) -> None:
        facts = [fact for row in (await self._charged())[:16] for fact in self._facts(row)]
        await self.plane.report(*facts)

    async def inventory(self) -> None:
        self.plane.change_node(self.rng.choice(self.nodes), address=str(self.rng.random()))
        await self.plane.send_inventory()

    async def runner(self) -> None:
        rows = await self._charged()
        kinds = ["first_step", "rendezvous", "progress", "checkpoint"]
        marks = [self.plane.mark(row, self.rng.choice(kinds), total_steps=5, url="/x", step=3) for row in rows[::2]]
        metrics = [self.plane.metric(row, loss=1.0) for row in rows]
        await self.plane.heartbeat(self.rng.choice(self.nodes), *rows[::3], metrics=metrics, marks=marks)

    async def operator(self) -> None:
        name = self.rng.choice(self.nodes)
        wanted = self.rng.choice([NodeState.READY, NodeState.READY, NodeState.DRAINING])
        await set_node_state(
            self.plane.engine, (await self.plane.node(name)).id, wanted=wanted, actor=SYSTEM, now=self.plane.now
        )
        if self.rng.random() < 0.3:
            await self.plane.lose(name)

    async def _charged(self) -> list[Row[Any]]:
        async with self.plane.engine.connect() as conn:
            rows = list(await conn.execute(select(attempts).where(attempts.c.released_at.is_(None))))
        self.rng.shuffle(rows)
        return rows

    def _facts(self, row: Row[Any]) -> list[Any]:
        if row.state == "lost":
            return [self.plane.fact(row, "gone", node=name) for name in self.nodes]
        if self.rng.random() < 0.9:
            return [self.plane.fact(row, "gang_ready"), self.plane.fact(row, "started")]
        return [self.plane.ended(row, self.rng.choice([0, 1]))]

    def _job(self) -> UUID:
        return self.rng.choice(self.jobs)


async def test_everybody_at_once(plane: ControlPlane) -> None:
    crowd = Crowd(plane, await plane.add_nodes(3, gpus=16), seed=5)
    for _ in range(40):
        await crowd.user()

    async def take_turns(turn: Callable[[], Awaitable[None]]) -> None:
        for _ in range(TURNS):
            await turn()

    twice = (crowd.agent, crowd.agent, crowd.runner, crowd.runner)
    others = (crowd.user, crowd.canceller, crowd.holder, crowd.scheduler, crowd.inventory, crowd.operator)
    async with asyncio.TaskGroup() as group:
        for turn in (*twice, *others):
            group.create_task(take_turns(turn))
    async with plane.engine.connect() as conn:
        for query in (GIVEN_TWICE, HELD_BY_THE_DEAD, AT_ODDS):
            assert list(await conn.exec_driver_sql(query)) == [], query
