"""A world that comes from a seed: users, operators, two schedulers, a cluster and a network, all doing their worst.

Actions, loops, store, planner and the agent's rules are the real ones, on a real database; the clock, the machines and
the network are not. Ids and chance come from the seed, so a seed reproduces its world exactly. After each step
everything in `invariants.py` must hold; when the faults end, every job must.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import invariants
from agents import Cluster, FakeAgent, Server
from control_plane import ControlPlane
from machines import LONGEST_STEP_S, Machine
from network import Away, Network
from phalanx_server.actions.agent_instance import expect_instance
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.actions.record_agent_report import record_agent_report
from phalanx_server.actions.record_node_report import record_node_report
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.actions.update_inventory import update_inventory
from phalanx_server.domain import messages as m
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.errors import Conflict, Superseded
from phalanx_server.domain.node import NodeState
from phalanx_server.loops.enforce import Enforce
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.loops.watch_nodes import Patience, WatchNodes
from phalanx_server.scheduling.snapshot import Policy, Snapshot, changed
from phalanx_server.store import ids
from phalanx_server.store.schema import jobs, nodes, placements, quotas, tenants
from phalanx_server.store.snapshots import load_changes, load_snapshot, reading
from sqlalchemy import insert, select, text

FENCE_S, LOSS_GRACE_S, LEASE_TTL_S = 60.0, 5.0, 4.0
PATIENCE = Patience(node_timeout_s=20, startup_grace_s=15, fence_s=FENCE_S, loss_grace_s=LOSS_GRACE_S)
STEP_S = (0.5, 1.0, 1.0, 2.0, LONGEST_STEP_S)
SETTLE_ROUNDS = 400


class Broken(AssertionError):
    """Something that must hold does not; the message says the seed and the step."""


@dataclass
class Scheduler:
    """One scheduler process. While it is stopped it does nothing and believes in its lease."""

    leader: Leader
    schedule: ScheduleLoop
    watch: WatchNodes
    enforce: Enforce
    silent_until_s: float = 0.0


@dataclass
class World:
    plane: ControlPlane
    seed: int
    machines: int = 3
    dice: random.Random = field(init=False)
    steps: int = 0
    story: list[str] = field(default_factory=list)  # what chance did, for whoever reads a failure

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.network = Network(self.dice)
        self.policy = Policy(consolidation=self.dice.random() < 0.5, fair_sharing=self.dice.random() < 0.3)
        gpus = self.dice.choice([2, 4])
        self.cluster = Cluster({f"node-{i}": Machine(f"node-{i}", gpus, self.dice) for i in range(self.machines)})
        self.instances = itertools.count(1)
        self.agent: FakeAgent | None = self._new_agent()
        self.agent_back_at_s = 0.0
        self.schedulers: list[Scheduler] = []
        self.holders = itertools.count(1)
        self.tenants: list[UUID] = []

    @property
    def now_s(self) -> float:
        return self.plane.now.timestamp()

    async def open(self) -> World:
        await self.plane.leader.resign()
        await self._add_tenants()
        for machine in self.cluster.machines.values():
            machine.start(self.now_s)
        self.schedulers = [self._new_scheduler() for _ in range(2)]
        return self

    async def _add_tenants(self) -> None:
        """A tree with quotas that bind: two teams below one root, one of which may borrow."""
        total = sum(machine.gpus for machine in self.cluster.machines.values())
        self.tenants = [ids.new_id(), ids.new_id()]
        async with self.plane.engine.begin() as conn:
            rows = [
                {"id": tenant, "path": f"default/{name}", "parent_id": self.plane.tenant_id}
                for tenant, name in zip(self.tenants, ("a", "b"), strict=True)
            ]
            await conn.execute(insert(tenants), rows)
            limits = [
                {"nominal": total // 2, "borrowing_limit": total // 4},
                {"nominal": total - total // 2, "borrowing_limit": 0},
            ]
            await conn.execute(
                insert(quotas),
                [
                    {"tenant_id": tenant, "resource": "h100", **limit}
                    for tenant, limit in zip(self.tenants, limits, strict=True)
                ],
            )

    def _new_agent(self) -> FakeAgent:
        return FakeAgent(f"agent-{next(self.instances)}", self.cluster, self.network, self.dice)

    def _new_scheduler(self) -> Scheduler:
        engine = self.plane.engine
        leader = self.plane.new_leader(f"scheduler-{next(self.holders)}-of-{self.seed}")
        return Scheduler(
            leader,
            ScheduleLoop(engine, leader, policy=self.policy),
            WatchNodes(engine, leader, PATIENCE),
            Enforce(engine, leader, policy=self.policy),
        )

    # ------------------------------------------------------------------ time

    async def run(self, steps: int) -> None:
        """So many steps of trouble, then peace until every job has ended. Raises Broken."""
        for _ in range(steps):
            await self.step(self.dice.choice(STEP_S))
        await self.settle()

    async def step(self, seconds: float, *, trouble: bool = True) -> None:
        self.steps += 1
        self.plane.later(seconds)
        if trouble:
            await self.dice.choice([self.submit, self.submit, self.meddle, self.fault, self.fault, self.nothing])()
        for machine in self.cluster.machines.values():
            machine.pass_time(self.now_s)
        with contextlib.suppress(Superseded):
            await self.network.deliver_late(self.now_s)
        await self._agent_tick()
        for machine in self.cluster.machines.values():
            await self._runner_tick(machine)
        for scheduler in self.schedulers:
            await self._scheduler_tick(scheduler)
        await self.check()

    async def settle(self) -> None:
        """The faults are over: everything comes back, nobody makes trouble, and every job must end."""
        self.network.faults, self.network.down_until_s = False, 0.0
        self.agent_back_at_s = 0.0
        for machine in self.cluster.machines.values():
            machine.cut_until_s = machine.mute_until_s = machine.back_at_s = 0.0
        for scheduler in self.schedulers:
            scheduler.silent_until_s = 0.0
        await self._operators_make_ready()
        for _ in range(SETTLE_ROUNDS):
            if not await self.unfinished():
                break
            await self.step(LONGEST_STEP_S, trouble=False)
        left = await self.unfinished()
        if left:
            raise self._broken([f"{name} is left {state}: {why}" for name, state, why in left])
        async with self.plane.engine.connect() as conn:
            wrong = await invariants.unexplained(conn)
        if wrong:
            raise self._broken(wrong)
        await self._is_quiet()

    async def _is_quiet(self) -> None:
        """With every job ended nothing runs and nothing is held any more, lost attempts included, after a while."""
        for _ in range(SETTLE_ROUNDS):
            running = [
                machine.name
                for machine in self.cluster.machines.values()
                if machine.runner and machine.runner.present()
            ]
            held = [row.attempt_id.hex for row in await self.plane.rows(placements) if row.released_at is None]
            if not running and not held and not self.cluster.placement_groups and not self.cluster.keys:
                return
            await self.step(LONGEST_STEP_S, trouble=False)
        raise self._broken([f"{running} still have something, {held} still hold something"])

    async def _operators_make_ready(self) -> None:
        for row in await self.plane.rows(jobs, jobs.c.id):
            if row.held:
                with contextlib.suppress(Conflict):
                    await release_job(self.plane.engine, row.id, actor=SYSTEM, now=self.plane.now)
        for row in await self.plane.rows(nodes, nodes.c.name):
            await set_node_state(self.plane.engine, row.id, wanted=NodeState.READY, actor=SYSTEM, now=self.plane.now)

    async def unfinished(self) -> list[tuple[str, str, str]]:
        """Jobs that have not ended and could. One that no node can hold waits for ever, and says so; a CPU job waits
        for as long as GPUs are free, which keep their share of the CPUs."""
        query = text(
            "SELECT j.id, j.state, h.reason, h.message FROM jobs j LEFT JOIN holds h ON h.job_id = j.id"
            " WHERE j.finished_at IS NULL AND h.reason IS DISTINCT FROM 'impossible' AND NOT"
            " (h.reason IS NOT DISTINCT FROM 'capacity' AND j.spec->'resources'->>'gpus_per_replica' = '0')"
            " ORDER BY j.id"
        )
        async with self.plane.engine.connect() as conn:
            rows = list(await conn.execute(query))
        return [(row.id.hex, row.state, f"{row.reason} {row.message}") for row in rows]

    async def check(self) -> None:
        async with self.plane.engine.connect() as conn:
            wrong = await invariants.broken(conn, self.cluster.machines.values(), now=self.plane.now)
        if wrong:
            raise self._broken(wrong)

    def _broken(self, wrong: list[str]) -> Broken:
        story = "\n  ".join(self.story[-40:])
        return Broken(f"seed {self.seed}, step {self.steps}: " + "; ".join(wrong) + f"\nlately:\n  {story}")

    def _tell(self, what: str) -> None:
        self.story.append(f"step {self.steps} at {self.now_s % 100_000:.1f}: {what}")

    # ------------------------------------------------------------------ what chance does

    async def nothing(self) -> None:
        return

    async def submit(self) -> None:
        dice = self.dice
        shape: dict[str, Any] = {"replicas": dice.choice([1, 1, 2, 3]), "gpus": dice.choice([0, 1, 1, 1, 2, 2, 4])}
        least, most = dice.choice([1, shape["replicas"]]), dice.choice([shape["replicas"], 4])
        if least < most and dice.random() < 0.5:
            shape["resources"] = {"elastic": {"min_replicas": least, "max_replicas": most}}
        preemption = {"preemptible": dice.random() < 0.8, "grace": dice.choice([0, 3, 30])}
        preemption["min_runtime"] = dice.choice([0, 0, 20])
        retries = {"max": dice.choice([0, 2]), "backoff": dice.choice([0, 20])}
        run: dict[str, Any] = {"command": "python t.py"}
        if dice.random() < 0.3:
            run["environment"] = {"requirements": ["numpy"]}
        if dice.random() < 0.3:
            run["outputs"] = ["out/**"]
        job_id = await self.plane.submit(
            **shape,
            run=run,
            retries=retries,
            preemption=preemption,
            priority=dice.choice([-1, 0, 0, 1]),
            time_limit=dice.choice([None, None, 15, 60]),
            tenant_id=dice.choice(self.tenants),
        )
        self._tell(f"submit {job_id.hex[-8:]} {shape} {' with '.join(run)}")

    async def meddle(self) -> None:
        """A user changes their mind, or an operator tends a node."""
        rows = await self.plane.rows(jobs, jobs.c.id)
        if rows and self.dice.random() < 0.7:
            job: UUID = self.dice.choice(rows).id
            deed = self.dice.choice([cancel_job, hold_job, release_job])
            with contextlib.suppress(Conflict):  # it is over already, or not waiting
                await deed(self.plane.engine, job, actor=SYSTEM, now=self.plane.now)
                self._tell(f"{deed.__name__} {job.hex[-8:]}")
            return
        rows = await self.plane.rows(nodes, nodes.c.name)
        if rows:
            row = self.dice.choice(rows)
            wanted = self.dice.choice([NodeState.READY, NodeState.READY, NodeState.CORDONED, NodeState.DRAINING])
            await set_node_state(self.plane.engine, row.id, wanted=wanted, actor=SYSTEM, now=self.plane.now)
            self._tell(f"{row.name} shall be {wanted}")

    async def fault(self) -> None:
        machine = self.dice.choice(list(self.cluster.machines.values()))
        lasts_s = self.dice.choice([1.0, 4.0, 15.0, 40.0, 100.0])
        fault = self.dice.choice(
            ["raylet", "runner", "cut", "cut", "mute", "agent", "agent", "server", "scheduler", "scheduler", "rank"]
        )
        self._tell(f"{fault} of {machine.name} for {lasts_s:g} s")
        if fault == "raylet" and machine.ray_id is not None:
            machine.kill_raylet(self.now_s, lasts_s)
        elif fault == "runner" and machine.runner is not None:
            machine.kill_runner(self.now_s)
        elif fault == "cut":
            machine.cut_until_s = self.now_s + lasts_s
        elif fault == "mute":
            machine.mute_until_s = self.now_s + lasts_s
        elif fault == "agent":
            self.agent, self.agent_back_at_s = None, self.now_s + min(lasts_s, 40.0)
        elif fault == "server":
            self.network.down_until_s = self.now_s + lasts_s
        elif fault == "scheduler":
            await self._stop_scheduler(self.dice.choice(self.schedulers), lasts_s)
        elif fault == "rank" and machine.running():
            self.dice.choice(machine.running()).end(self.now_s, signal=self.dice.choice([9, 11]))

    async def _stop_scheduler(self, scheduler: Scheduler, lasts_s: float) -> None:
        """It is killed, and another process takes its place; or it is only stopped, and goes on unaware."""
        if self.dice.random() < 0.5:
            self.schedulers[self.schedulers.index(scheduler)] = fresh = self._new_scheduler()
            fresh.silent_until_s = self.now_s + min(lasts_s, 15.0)
        else:
            scheduler.silent_until_s = self.now_s + lasts_s
        async with self.plane.engine.begin() as conn:  # leases go by the database's clock, which is not the world's
            expire = text("UPDATE leases SET expires_at = now() WHERE holder = :holder")
            await conn.execute(expire, {"holder": scheduler.leader._holder})

    # ------------------------------------------------------------------ what goes on by itself

    async def _agent_tick(self) -> None:
        if self.agent is None or self.agent.superseded:
            if self.now_s < self.agent_back_at_s:
                return
            self.agent = self._new_agent()
        await self.agent.tick(self.now_s, Server(self._put_nodes, self._desired, self._report))

    async def _put_nodes(self, inventory: m.Inventory) -> m.InventoryAnswer:
        return await update_inventory(
            self.plane.engine,
            inventory,
            cluster_id=self.plane.cluster_id,
            now=self.plane.now,
            fence_s=FENCE_S,
            heartbeat_s=2.0,
        )

    async def _desired(self, instance: str) -> m.Desired:
        async with self.plane.engine.connect() as conn:
            await expect_instance(conn, cluster_id=self.plane.cluster_id, instance=instance)
        return await self.plane.desired()

    async def _report(self, report: m.AgentReport) -> m.ReportAnswer:
        return await record_agent_report(
            self.plane.engine, report, cluster_id=self.plane.cluster_id, now=self.plane.now
        )

    async def _runner_tick(self, machine: Machine) -> None:
        """Marks of its ranks, and one report if the server can be reached."""
        runner = machine.runner
        if runner is None:
            return
        marks = [
            m.Mark(
                attempt_id=ranks.attempt.attempt_id,
                epoch=ranks.attempt.epoch,
                rank=ranks.place.first_rank,
                kind=self.dice.choice(["first_step", "checkpoint", "rendezvous"]),
                at=self.now_s,
                data={"url": f"/ckpt/{ranks.attempt.job_id}/{runner.seq}", "step": runner.seq},
            )
            for ranks in machine.running()
            if self.dice.random() < 0.2
        ]
        runner.report(self.now_s, marks)
        report = runner.sent(self.now_s)
        reached = not machine.is_cut(self.now_s) and self.now_s >= machine.mute_until_s
        node_id = await self._node_id(machine.name)
        if report is None or node_id is None:
            return
        try:
            answer = await self.network.call(self.now_s, lambda: self._node_report(report, node_id), reached=reached)
        except Away:
            return
        runner.waiting = [each for each in runner.waiting if each.seq > answer.accepted_seq]

    async def _node_report(self, report: m.NodeReport, node_id: UUID) -> m.NodeAnswer:
        return await record_node_report(
            self.plane.engine, self.plane.files, report, node_id=node_id, now=self.plane.now
        )

    async def _node_id(self, name: str) -> UUID | None:
        async with self.plane.engine.connect() as conn:
            return (await conn.execute(select(nodes.c.id).where(nodes.c.name == name))).scalar_one_or_none()

    async def _scheduler_tick(self, scheduler: Scheduler) -> None:
        """A scheduler that cannot reach the database, which is away with the server here, ticks in vain."""
        if self.now_s < max(scheduler.silent_until_s, self.network.down_until_s):
            return
        now = self.plane.now
        if scheduler.leader.lease is None or self.dice.random() < 0.5:
            await scheduler.leader.tick(now)
        await scheduler.watch.tick(now)
        await scheduler.enforce.tick(now)
        await scheduler.schedule.tick(now)
        if self.dice.random() < 0.1:
            await self._compare(scheduler.schedule)

    async def _compare(self, schedule: ScheduleLoop) -> None:
        """The planner in memory knows, with the changes since, what a fresh load says."""
        memory = schedule._memory
        if memory is None:
            return
        async with reading(self.plane.engine) as conn:
            fresh, cursor = await load_snapshot(conn, self.plane.now, self.policy)
            changes, known = await load_changes(conn, memory.cursor, self.plane.now)
        plan = changed(memory.planner.snapshot(), changes)
        pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("jobs", _unpredicted(plan), _unpredicted(fresh)),
            ("nodes", {node.name: node for node in plan.nodes}, {node.name: node for node in fresh.nodes}),
            ("versions", dict(known.versions), dict(cursor.versions)),
            ("running jobs", dict(known.running), dict(cursor.running)),
            ("kept places", dict(known.kept), dict(cursor.kept)),
        ]
        wrong = [
            f"the planner's {what} are not as stored: {name} is {known.get(name)}, stored {stored.get(name)}"
            for what, known, stored in pairs
            for name in known.keys() | stored.keys()
            if known.get(name) != stored.get(name)
        ]
        if wrong:
            raise self._broken(wrong)


def _unpredicted(snapshot: Snapshot) -> dict[str, Any]:
    """The jobs as they are stored: what is expected of them is the scheduler's own."""
    return {job.id: replace(job, predicted_s=None) for job in snapshot.jobs}


@contextlib.contextmanager
def seeded_ids(plane: ControlPlane, seed: int) -> Any:
    """Ids from the world's clock and the seed: ties between jobs are broken by them."""
    dice = random.Random(seed)
    count = itertools.count(1)

    class Os:
        urandom = staticmethod(dice.randbytes)

    def tick() -> int:
        return ((int(plane.now.timestamp() * 1000)) << 12) + next(count)

    with patch.object(ids, "os", Os), patch.object(ids, "_next_tick", tick):
        yield
