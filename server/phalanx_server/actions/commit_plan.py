"""Commit a plan: start what can still start, let give way what still should, and store why the others wait.

Owns the last word on a decision. The plan was made on a snapshot; here, under the scheduler's lease and with nodes and
jobs locked, each start is checked against the ledger again: the job is queued at the version that the pass saw, its
nodes take work, their agent is heard, the GPUs are free, something is left of its time limit. A start that no longer
holds is dropped, and a gang is all or nothing. What gives way is checked in `give_way`. Commits are serial, because
each locks the lease.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.expect_lease import expect_lease
from phalanx_server.actions.give_way import Seen, give_way, jobs_of, kept_of, nodes_of, orders_of
from phalanx_server.actions.ledger import Ledger
from phalanx_server.domain.attempt import OUT_OF_TIME, StopCause
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.gang import Group
from phalanx_server.scheduling.plan import Plan, Start
from phalanx_server.scheduling.predict import Expectation
from phalanx_server.store.attempts import (
    NewAttempt,
    NewPlacement,
    create_attempts,
    last_checkpoints,
    lock_jobs,
    lock_queued_jobs,
)
from phalanx_server.store.calibration import record_runs
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.holds import HoldRow, delete_holds, upsert_holds
from phalanx_server.store.ids import new_id
from phalanx_server.store.leases import Lease
from phalanx_server.store.speeds import inherit
from phalanx_server.store.time_limits import used_up_of
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of the plan: `started` jobs with their new attempts, `stopped` ones with the cause, `dropped` ones
    with why. `unheld`: waiting jobs whose hold was not stored, because nobody gives way for them after all."""

    started: Mapping[str, UUID] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    stopped: Mapping[str, StopCause] = field(default_factory=dict)
    unheld: frozenset[str] = frozenset()


@rerun_on_deadlock
async def commit_plan(
    engine: AsyncEngine,
    plan: Plan,
    lease: Lease,
    *,
    versions: Mapping[str, int],
    now: datetime,
    running: Mapping[str, int] | None = None,
    holds: Sequence[HoldRow] = (),
    expected: Mapping[str, Expectation] | None = None,
    default_limit_s: float | None = None,
) -> Committed:
    """Carry out the plan's decisions and store `holds`, those of the plan that are news (see `store.holds`).

    `versions` are the versions of the queued jobs that the pass was made on, `running` those of the running ones;
    `expected` is how long jobs that start are expected to run, kept of first starts to compare it with what comes;
    `default_limit_s` is the time limit of jobs that name none. Raises LeaseLost.
    """
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        committed = await _carry_out(conn, plan, versions, running or {}, holds, default_limit_s, now)
        over = committed.started.keys() | committed.unheld
        await upsert_holds(conn, [row for row in holds if row.job_id.hex not in over], now=now)
        started = expected.keys() & committed.started.keys() if expected else ()
        await record_runs(conn, {UUID(hex=job): expected[job] for job in sorted(started)} if expected else {})
    return committed


async def _carry_out(
    conn: AsyncConnection,
    plan: Plan,
    versions: Mapping[str, int],
    running: Mapping[str, int],
    holds: Sequence[HoldRow],
    default_limit_s: float | None,
    now: datetime,
) -> Committed:
    """Locks in the order of `store.attempts`: nodes, then jobs, those of the holds that are about a kept place too."""
    orders = orders_of(plan)
    kept = kept_of(plan, orders)
    starting = [UUID(hex=start.job) for start in plan.starts]
    nodes = nodes_of(orders, kept) | {UUID(hex=item.node) for start in plan.starts for item in start.placement}
    ledger = await Ledger.open(conn, nodes, now=now, soon=bool(orders))
    claims = [row.job_id for row in holds if row.kept is not None]
    await lock_jobs(conn, [*starting, *jobs_of(orders), *claims], held=[row.job_id for row in holds])
    wanted = {*starting, *(order.for_job for order in orders if order.for_job is not None)}
    waiting = {row.id: row for row in await lock_queued_jobs(conn, wanted)} if wanted else {}
    committed = await _start(conn, plan.starts, ledger, waiting, versions, default_limit_s, now)
    if not orders:
        return committed
    still_waiting = {job: row for job, row in waiting.items() if job.hex not in committed.started}
    gave_way = await give_way(conn, orders, ledger, Seen(versions, running, still_waiting, kept), now=now)
    dropped = {**committed.dropped, **gave_way.dropped}
    return Committed(committed.started, dropped, gave_way.stopped, gave_way.in_vain)


async def _start(
    conn: AsyncConnection,
    starts: Sequence[Start],
    ledger: Ledger,
    jobs: Mapping[UUID, Row[Any]],
    versions: Mapping[str, int],
    default_limit_s: float | None,
    now: datetime,
) -> Committed:
    again = [job.id for start in starts if (job := jobs.get(UUID(hex=start.job))) is not None and job.attempts]
    resume = await last_checkpoints(conn, again) if again else {}
    used_up = await used_up_of(conn, again, default_s=default_limit_s) if again else set()
    launches: list[Launch] = []
    dropped: dict[str, str] = {}
    for start in starts:
        job = jobs.get(UUID(hex=start.job))
        version = versions.get(start.job)
        launch = _launch(start, job, ledger, version=version, resume=resume, used_up=used_up, now=now)
        if isinstance(launch, Launch):
            launches.append(launch)
        else:
            dropped[start.job] = launch
    await _write(conn, launches)
    await inherit(conn, [launch.job.id for launch in launches if launch.is_first_of_elastic])
    return Committed({launch.start.job: launch.attempt_id for launch in launches}, dropped)


def _launch(
    start: Start,
    job: Row[Any] | None,
    ledger: Ledger,
    *,
    version: int | None,
    resume: Mapping[UUID, str],
    used_up: Collection[UUID],
    now: datetime,
) -> Launch | str:
    """The start, with its place taken; or why it is dropped."""
    if job is None:
        return "the job is no longer queued"
    if job.version != version:
        return "the job has changed since the pass looked at it"
    if job.held or job.cancel_requested_at is not None:
        return "the job is held or being cancelled"
    if job.id in used_up:
        return OUT_OF_TIME  # the loop that enforces limits is about to end it
    groups = ledger.place(start.placement, job.spec["resources"])
    if isinstance(groups, str):
        return groups
    return Launch(start, job, ledger.cluster_of(start.placement), groups, resume.get(job.id), now)


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

    @property
    def is_first_of_elastic(self) -> bool:
        return not self.job.attempts and self.job.spec["resources"].get("elastic") is not None

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
