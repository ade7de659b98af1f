"""A control plane under test: real PostgreSQL, real actions and loops; tests are the clock, the agent and the runners.

Nothing here sleeps: `now` moves when a test moves it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from phalanx_server.actions.desired import desired
from phalanx_server.actions.lose_node import Loss, lose_node
from phalanx_server.actions.record_agent_report import record_agent_report
from phalanx_server.actions.record_node_report import record_node_report
from phalanx_server.actions.submit_jobs import Accepted, Submission, Submitter
from phalanx_server.actions.update_inventory import update_inventory
from phalanx_server.domain import messages as m
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.spec import parse_job
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Job, Policy
from phalanx_server.store import ids
from phalanx_server.store.jobs import JobRow, insert_jobs
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.schema import attempts, clusters, events, jobs, leases, nodes, placements, tenants
from phalanx_server.store.snapshots import load_snapshot, reading
from sqlalchemy import Row, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
GIB = 1 << 30
MOST_RANKS = 16  # of a gang in these tests
FENCE_S, LOSS_GRACE_S = 60.0, 5.0


@dataclass
class ControlPlane:
    """One cluster `main`, one tenant `default`, and whatever a test adds."""

    engine: AsyncEngine
    storage: Path
    now: datetime = START
    tenant_id: UUID = field(default_factory=ids.new_id)
    cluster_id: UUID = field(default_factory=ids.new_id)
    instance: str = "agent-1"
    silent: bool = False  # the agent: it is not heard while time passes
    policy: Policy = field(default_factory=Policy)  # of the settings file
    facts: dict[str, m.NodeFacts] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    leader: Leader = field(init=False)
    scheduler: ScheduleLoop = field(init=False)

    async def open(self) -> ControlPlane:
        async with self.engine.begin() as conn:
            await conn.execute(insert(tenants).values(id=self.tenant_id, path="default"))
            await conn.execute(insert(clusters).values(id=self.cluster_id, name="main"))
        self.files = LogFiles(self.storage.as_uri())
        self.leader = self.new_leader("scheduler-1")
        self.scheduler = ScheduleLoop(self.engine, self.leader, policy=self.policy)
        await self.leader.tick(self.now)
        return self

    def new_leader(self, holder: str, ttl_s: float = 600.0) -> Leader:
        return Leader(self.engine, holder=holder, ttl_s=ttl_s, renew_s=1.0)

    async def depose(self) -> None:
        """Another leads, and this leader does not know it yet."""
        async with self.engine.begin() as conn:
            await conn.execute(update(leases).values(epoch=leases.c.epoch + 1))

    def later(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now

    # ------------------------------------------------------------------ nodes

    async def add_nodes(self, count: int = 2, *, gpus: int = 4, **facts: Any) -> list[str]:
        names = [f"node-{len(self.facts) + index}" for index in range(count)]
        for name in names:
            given = {"gpu_type": "h100", "gpus": gpus, "cpus": 16, "memory_bytes": 64 * GIB, "address": "10.0.0.1"}
            self.facts[name] = m.NodeFacts(name=name, ray_node_id=f"ray-{name}", **given | facts)
        await self.send_inventory()
        for name in names:
            await self.heartbeat(name)
        return names

    def change_node(self, name: str, /, **values: Any) -> None:
        self.facts[name] = self.facts[name].model_copy(update=values)

    async def send_inventory(
        self, instance: str | None = None, *, without_token: tuple[str, ...] = ()
    ) -> m.InventoryAnswer:
        inventory = m.Inventory(
            instance=instance or self.instance,
            sent_at=self.now.timestamp(),
            nodes=list(self.facts.values()),
            without_token=list(without_token),
        )
        return await update_inventory(
            self.engine, inventory, cluster_id=self.cluster_id, now=self.now, fence_s=FENCE_S, heartbeat_s=2.0
        )

    async def node(self, name: str) -> Row[Any]:
        return await self._one(nodes, nodes.c.name == name)

    async def lose(self, name: str) -> Loss | None:
        node_id = (await self.node(name)).id
        return await lose_node(
            self.engine, node_id, why="a test says so", now=self.now, fence_s=FENCE_S, grace_s=LOSS_GRACE_S
        )

    # ------------------------------------------------------------------ jobs

    async def submit(self, *, replicas: int = 1, gpus: int = 1, **fields: Any) -> UUID:
        resources = {"replicas": replicas, "gpus_per_replica": gpus} | fields.pop("resources", {})
        tenant_id = fields.pop("tenant_id", self.tenant_id)
        document = {"name": "job", "tenant": "default", "resources": resources, "run": {"command": "python t.py"}}
        spec = parse_job(document | fields)
        job_id = ids.new_id()
        row = JobRow(
            id=job_id,
            tenant_id=tenant_id,
            name=spec.name,
            priority=spec.priority_value,
            spec=spec.dump(),
            labels=spec.labels,
            bundle=None,
            created_by="test",
            traceparent=None,
            received_at=self.now,
            submitted_at=self.now,
            held=spec.held,
            not_before=spec.not_before,
        )
        async with self.engine.begin() as conn:
            await insert_jobs(conn, [row])
        return job_id

    async def submit_file(self, **fields: Any) -> Accepted:
        """Submit a job file the way that the API does: checked, with what it waits for and all jobs of an array."""
        document = {"name": "job", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "python t.py"}}
        submission = Submission(specs=[parse_job(document | fields)], actor=SYSTEM, received_at=self.now)
        submitter = Submitter(self.engine, policy=self.policy, clock=lambda: self.now)
        await submitter.start()
        try:
            return await submitter.submit(submission)
        finally:
            await submitter.close()

    async def job(self, job_id: UUID) -> Row[Any]:
        return await self._one(jobs, jobs.c.id == job_id)

    async def attempt(self, job_id: UUID) -> Row[Any]:
        """The newest attempt of a job."""
        query = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number.desc()).limit(1)
        async with self.engine.connect() as conn:
            return (await conn.execute(query)).one()

    async def placements(self, job_id: UUID) -> list[Row[Any]]:
        """Of the newest attempt, by group; with the name of the node."""
        attempt = await self.attempt(job_id)
        query = (
            select(placements, nodes.c.name.label("node"))
            .join(nodes)
            .where(placements.c.attempt_id == attempt.id)
            .order_by(placements.c.group_rank)
        )
        async with self.engine.connect() as conn:
            return list(await conn.execute(query))

    async def kinds(self, job_id: UUID) -> list[str]:
        """The kinds of a job's events, in their order."""
        query = select(events.c.kind).where(events.c.job_id == job_id).order_by(events.c.id)
        async with self.engine.connect() as conn:
            return list((await conn.execute(query)).scalars())

    async def state(self, job_id: UUID) -> str:
        return (await self.job(job_id)).state

    # ------------------------------------------------------------------ the scheduler, the agent, the runners

    async def tick(self) -> Any:
        """A pass. Before it the agent was heard, unless it is `silent`."""
        if not self.silent:
            await self._hear_agent()
        return await self.scheduler.tick(self.now)

    async def _hear_agent(self) -> None:
        async with self.engine.begin() as conn:
            await conn.execute(
                update(clusters).where(clusters.c.agent_instance.isnot(None)).values(agent_seen_at=self.now)
            )

    async def desired(self) -> m.Desired:
        async with self.engine.connect() as conn:
            return await desired(conn, cluster_id=self.cluster_id, now=self.now)

    def fact(self, attempt: Row[Any], kind: str, **values: Any) -> m.AttemptFact:
        given = {"epoch": attempt.epoch, "at": self.now.timestamp()} | values
        return m.AttemptFact(attempt_id=ids.encode("attempt", attempt.id), kind=kind, **given)

    async def report(self, *facts: m.AttemptFact, instance: str | None = None, skew_s: float = 0) -> list[m.Refused]:
        report = m.AgentReport(
            instance=instance or self.instance, sent_at=self.now.timestamp() + skew_s, facts=list(facts)
        )
        return (await record_agent_report(self.engine, report, cluster_id=self.cluster_id, now=self.now)).refused

    async def start(self, job_id: UUID) -> Row[Any]:
        """Report that a job's newest attempt runs; the attempt."""
        attempt = await self.attempt(job_id)
        ranks = [
            m.RankStart(rank=r, node=p.node, pid=100 + r, started_at=self.now.timestamp(), warm=True)
            for p in await self.placements(job_id)
            for r in range(p.first_rank, p.first_rank + p.ranks)
        ]
        refused = await self.report(
            self.fact(attempt, "gang_ready"), self.fact(attempt, "started", ranks_started=ranks)
        )
        assert refused == []
        return await self.attempt(job_id)

    async def run(self, **fields: Any) -> tuple[UUID, Row[Any]]:
        """Submit, schedule and start a job."""
        job_id = await self.submit(**fields)
        await self.tick()
        return job_id, await self.start(job_id)

    def ended(self, attempt: Row[Any], *exit_codes: int | None, **values: Any) -> m.AttemptFact:
        """Every rank is gone, with these codes by rank; one code stands for all."""
        codes = exit_codes if len(exit_codes) > 1 else exit_codes * MOST_RANKS
        exits = [m.RankExit(rank=rank, exit_code=code) for rank, code in enumerate(codes)]
        return self.fact(attempt, "ended", exits=exits, **values)

    async def known_jobs(self) -> dict[str, Job]:
        """The jobs that the scheduler has in memory, which are those that another would load, but for forecasts."""
        assert self.scheduler._memory is not None
        live = self.scheduler._memory.planner.snapshot().jobs
        async with reading(self.engine) as conn:
            loaded = (await load_snapshot(conn, self.now, self.policy))[0].jobs
        plain = [{job.id: replace(job, predicted_s=None, speedup=None) for job in jobs} for jobs in (live, loaded)]
        assert plain[0] == plain[1]
        return plain[0]

    async def node_report(self, name: str, *, seq: int | None = None, boot: str | None = None, **parts: Any) -> Any:
        """What a runner sends; numbered by itself unless `seq` is given."""
        self.seqs[name] = seq or self.seqs.get(name, 0) + 1
        sent_at = self.now.timestamp() + parts.pop("skew_s", 0.0)
        report = m.NodeReport(boot=boot or f"boot-{name}", seq=self.seqs[name], sent_at=sent_at, **parts)
        node_id = (await self.node(name)).id
        return await record_node_report(self.engine, self.files, report, node_id=node_id, now=self.now)

    async def heartbeat(self, name: str, *attempts: Row[Any], **values: Any) -> Any:
        stats = m.NodeStats(cpu_utilization=0.5, memory_bytes=GIB)
        refs = [m.AttemptRef(attempt_id=ids.encode("attempt", a.id), epoch=a.epoch) for a in attempts]
        beat = m.Heartbeat(attempts=refs, stats=stats, warm_ready=True)
        return await self.node_report(name, heartbeat=beat, **values)

    def part(self, attempt: Row[Any], message: type[Any], /, **values: Any) -> Any:
        """A log chunk, metric point or mark of rank 0, now."""
        given = {"epoch": attempt.epoch, "rank": 0, "at": self.now.timestamp()} | values
        return message(attempt_id=ids.encode("attempt", attempt.id), **given)

    def metric(self, attempt: Row[Any], step: int | None = 1, **values: Any) -> m.MetricPoint:
        return self.part(attempt, m.MetricPoint, step=step, values=values)

    def mark(self, attempt: Row[Any], kind: str, rank: int = 0, **data: Any) -> m.Mark:
        return self.part(attempt, m.Mark, kind=kind, rank=rank, data=data)

    def log(self, attempt: Row[Any], text: str, offset: int = 0, **values: Any) -> m.LogChunk:
        data = base64.b64encode(text.encode()).decode()
        return self.part(attempt, m.LogChunk, **{"stream": "stdout", "offset": offset, "data": data} | values)

    async def _one(self, table: Table, condition: Any) -> Row[Any]:
        async with self.engine.connect() as conn:
            return (await conn.execute(select(table).where(condition))).one()

    async def rows(self, table: Table, *order: Any) -> list[Row[Any]]:
        async with self.engine.connect() as conn:
            return list(await conn.execute(select(table).order_by(*order)))
