"""Commit a plan: start what can still start, and store why the others wait.

Owns the last word on a decision. The plan was made on a snapshot; here, under the scheduler's lease and with nodes and
jobs locked, each start is checked against the ledger again: the job is queued at the version that the pass saw, its
nodes take work, their agent is heard, the GPUs are free. A start that no longer holds is dropped, and a gang is all or
nothing. Commits are serial, because each locks the lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.expect_lease import expect_lease
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.gang import Group, Seat, lay_out
from phalanx_server.domain.node import NodeState
from phalanx_server.scheduling.plan import Plan, Start
from phalanx_server.store.attempts import (
    Charge,
    NewAttempt,
    NewPlacement,
    charges,
    create_attempts,
    last_checkpoints,
    lock_queued_jobs,
)
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.holds import HoldRow, delete_holds, upsert_holds
from phalanx_server.store.ids import new_id
from phalanx_server.store.leases import Lease
from phalanx_server.store.nodes import lock_nodes_for_placing
from phalanx_server.store.snapshots import silent_clusters
from phalanx_server.store.wakeups import notify


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of the plan: `started` jobs with their new attempts, and `dropped` ones with why."""

    started: Mapping[str, UUID]
    dropped: Mapping[str, str]


async def commit_plan(
    engine: AsyncEngine,
    plan: Plan,
    lease: Lease,
    *,
    versions: Mapping[str, int],
    now: datetime,
    holds: Sequence[HoldRow] = (),
) -> Committed:
    """Start the plan's jobs and store `holds`, those of the plan that are news (see `store.holds`).

    `versions` are the versions of the queued jobs that the pass was made on. Raises LeaseLost.
    """
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        committed = await _start(conn, plan.starts, versions, now) if plan.starts else Committed({}, {})
        await upsert_holds(conn, [row for row in holds if row.job_id.hex not in committed.started], now=now)
    return committed


async def _start(
    conn: AsyncConnection, starts: Sequence[Start], versions: Mapping[str, int], now: datetime
) -> Committed:
    node_ids = {UUID(hex=item.node) for start in starts for item in start.placement}
    nodes = await lock_nodes_for_placing(conn, list(node_ids))
    jobs = {row.id: row for row in await lock_queued_jobs(conn, [UUID(hex=start.job) for start in starts])}
    ledger = Ledger.of(nodes, await charges(conn, node_ids), silent=await silent_clusters(conn, now=now))
    resume = await last_checkpoints(conn, [row.id for row in jobs.values() if row.attempts])
    launches: list[Launch] = []
    dropped: dict[str, str] = {}
    for start in starts:
        job = jobs.get(UUID(hex=start.job))
        launch = _launch(start, job, ledger, version=versions.get(start.job), resume=resume, now=now)
        if isinstance(launch, Launch):
            launches.append(launch)
        else:
            dropped[start.job] = launch
    await _write(conn, launches)
    return Committed({launch.start.job: launch.attempt_id for launch in launches}, dropped)


def _launch(
    start: Start,
    job: Row[Any] | None,
    ledger: Ledger,
    *,
    version: int | None,
    resume: Mapping[UUID, str],
    now: datetime,
) -> Launch | str:
    """The start, with its place taken; or why it is dropped."""
    if job is None:
        return "the job is no longer queued"
    if job.version != version:
        return "the job has changed since the pass looked at it"
    if job.held or job.cancel_requested_at is not None:
        return "the job is held or being cancelled"
    groups = ledger.place(start, job.spec["resources"])
    if isinstance(groups, str):
        return groups
    return Launch(start, job, ledger.cluster_of(start), groups, resume.get(job.id), now)


@dataclass
class Free:
    """What is left of a node."""

    gpu_indices: list[int]
    cpus: float
    memory_bytes: int


@dataclass
class Ledger:
    """Free resources of the locked nodes, and what each start of this commit takes of them; and the clusters that are
    silent."""

    nodes: Mapping[UUID, Row[Any]]
    silent: frozenset[UUID]
    free: dict[UUID, Free] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Mapping[UUID, Row[Any]], charged: Mapping[UUID, Charge], *, silent: frozenset[UUID]) -> Ledger:
        ledger = cls(nodes, silent)
        for node_id, node in nodes.items():
            charge = charged.get(node_id, Charge())
            indices = [index for index in range(node.gpus) if index not in charge.gpu_indices]
            ledger.free[node_id] = Free(indices, node.cpus - charge.cpus, node.memory_bytes - charge.memory_bytes)
        return ledger

    def cluster_of(self, start: Start) -> UUID:
        return self.nodes[UUID(hex=start.placement[0].node)].cluster_id

    def place(self, start: Start, resources: Mapping[str, Any]) -> tuple[Group, ...] | str:
        """Take what the whole gang needs and lay it out, nodes by name; or take nothing and say why."""
        replicas: dict[UUID, int] = {}
        for item in start.placement:
            node_id = UUID(hex=item.node)
            replicas[node_id] = replicas.get(node_id, 0) + item.replicas
        for node_id, count in replicas.items():
            reason = self._refusal(node_id, count, resources)
            if reason is not None:
                return reason
        if len({self.nodes[node_id].cluster_id for node_id in replicas}) > 1:
            return "a gang does not span clusters"
        in_order = sorted(replicas, key=lambda node_id: (self.nodes[node_id].name, node_id))
        groups = lay_out(
            [Seat(node_id.hex, replicas[node_id], self.free[node_id].gpu_indices) for node_id in in_order],
            gpus_per_replica=resources["gpus_per_replica"],
            ranks_per_replica=resources["ranks_per_replica"],
        )
        if groups is None:
            return "GPUs are no longer free"
        for group in groups:
            self._take(group, resources)
        return groups

    def _refusal(self, node_id: UUID, replicas: int, resources: Mapping[str, Any]) -> str | None:
        node, free = self.nodes.get(node_id), self.free.get(node_id)
        if node is None or free is None or node.state != NodeState.READY or not node.alive:
            return "a node does not take work"
        if node.cluster_id in self.silent:
            return f"the agent of {node.name} is silent"
        if replicas * resources["gpus_per_replica"] > len(free.gpu_indices):
            return f"GPUs of {node.name} are no longer free"
        if replicas * resources["cpus_per_replica"] > free.cpus:
            return f"CPUs of {node.name} are no longer free"
        if replicas * resources["memory_per_replica"] > free.memory_bytes:
            return f"memory of {node.name} is no longer free"
        return None

    def _take(self, group: Group, resources: Mapping[str, Any]) -> None:
        free = self.free[UUID(hex=group.node)]
        free.gpu_indices = [index for index in free.gpu_indices if index not in group.gpu_indices]
        free.cpus -= group.replicas * resources["cpus_per_replica"]
        free.memory_bytes -= group.replicas * resources["memory_per_replica"]


@dataclass(frozen=True, slots=True)
class Launch:
    """A start that holds: the rows that it becomes."""

    start: Start
    job: Row[Any]
    cluster_id: UUID
    groups: tuple[Group, ...]
    resume_from: str | None
    decided_at: datetime
    attempt_id: UUID = field(default_factory=new_id)

    @property
    def created_at(self) -> datetime:
        """Not before the job was accepted, whatever the clocks of two servers say."""
        return max(self.decided_at, self.job.submitted_at)

    def attempt(self) -> NewAttempt:
        return NewAttempt(
            id=self.attempt_id,
            job_id=self.job.id,
            cluster_id=self.cluster_id,
            number=self.job.attempts + 1,
            epoch=self.job.epoch + 1,
            gpu_type=self.start.gpu_type or "",
            replicas=self.start.replicas,
            resume_from=self.resume_from,
            created_at=self.created_at,
            grace_s=self.job.spec["preemption"]["grace"],
        )

    def placements(self) -> list[NewPlacement]:
        resources = self.job.spec["resources"]
        return [
            NewPlacement(
                attempt_id=self.attempt_id,
                node_id=UUID(hex=group.node),
                group_rank=group.group_rank,
                replicas=group.replicas,
                gpu_indices=list(group.gpu_indices),
                first_rank=group.first_rank,
                ranks=group.ranks,
                cpus=group.replicas * resources["cpus_per_replica"],
                memory_bytes=group.replicas * resources["memory_per_replica"],
            )
            for group in self.groups
        ]

    def event(self) -> Event:
        gpus = sum(len(group.gpu_indices) for group in self.groups)
        what = f"{gpus} {self.start.gpu_type or 'GPU'}" if gpus else "CPUs"
        nodes = f"{len(self.groups)} node{'s' if len(self.groups) > 1 else ''}"
        return Event(
            at=self.created_at,
            kind=EventKind.STARTING.value,
            message=f"Attempt {self.job.attempts + 1} starts on {nodes} with {what}.",
            job_id=self.job.id,
            attempt_id=self.attempt_id,
            data={"attempt": self.job.attempts + 1, "resume_from": self.resume_from},
        )


async def _write(conn: AsyncConnection, launches: Sequence[Launch]) -> None:
    if not launches:
        return
    job_ids = [launch.job.id for launch in launches]
    places = [place for launch in launches for place in launch.placements()]
    await create_attempts(conn, [launch.attempt() for launch in launches], places)
    await delete_holds(conn, job_ids)
    await record_events(conn, [launch.event() for launch in launches])
    await notify(conn, *(f"desired:{cluster.hex}" for cluster in {launch.cluster_id for launch in launches}))
    await notify(conn, *(f"job:{job_id.hex}" for job_id in job_ids))
