"""Tells the jobs that wait for others that those have ended, in the transaction that ends them.

Owns what that does to them: the last dependency that is met lets a job go on, one that can never be met cancels it, and
whoever waits for that one hears of it in turn. Nobody is looked for unless somebody waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.expect_lease import leading
from phalanx_server.domain.dependency import Verdict, judge
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import JobState, advance
from phalanx_server.store import ids
from phalanx_server.store.dependencies import (
    BAD,
    awaited,
    bad_of_arrays,
    forget_all,
    forget_met,
    lock_ends,
    lock_waiting,
    overlooked,
    still_open,
    unmet,
)
from phalanx_server.store.events import Event, record_alike, record_events
from phalanx_server.store.holds import delete_holds
from phalanx_server.store.jobs import change_jobs
from phalanx_server.store.leases import Lease
from phalanx_server.store.outbox import Notice, post_notices, state_notice
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

REASON = "dependency_failed"
SWEPT_MAX = 100


async def settle_dependents(conn: AsyncConnection, ended: Sequence[UUID], *, now: datetime) -> None:
    """Settle what the end of these jobs, which is written already, means for others; chains to their ends."""
    while ended:
        over = await awaited(conn, ended)
        if not over:
            return
        ended = await _settle(conn, over, now)


@rerun_on_deadlock
async def settle_overlooked(engine: AsyncEngine, lease: Lease, *, now: datetime) -> list[UUID]:
    """Settle what is over and nobody has settled: of two processes that ended the last jobs of an array, one was too
    old to take the lock of `lock_ends`. A job of each that was. Raises LeaseLost."""
    async with engine.connect() as conn:
        ended = await overlooked(conn, limit=SWEPT_MAX)
    if ended:
        async with leading(engine, lease) as conn:
            await settle_dependents(conn, ended, now=now)
    return ended


async def _settle(conn: AsyncConnection, over: Sequence[Row[Any]], now: datetime) -> list[UUID]:
    """One link of the chains: the jobs that were cancelled."""
    await lock_ends(conn, {row.array_id for row in over if row.as_array})
    targets = await _targets(conn, over)
    closed = [target.id for target in targets.values() if not target.is_open]
    bad = [target.id for target in targets.values() if target.bad is not None]
    if not closed and not bad:
        return []
    waiting = {row.id: row for row in await lock_waiting(conn, over=closed, bad=bad) if row.state == JobState.QUEUED}
    found = await unmet(conn, waiting, targets.keys())
    broken: dict[UUID, Target] = {}
    met: list[Row[Any]] = []
    for dependency in found:
        target = targets[dependency.on_id]
        verdict = judge(dependency.kind, is_open=target.is_open, is_bad=target.bad is not None)
        if verdict is Verdict.BROKEN:
            broken.setdefault(dependency.job_id, target)
        elif verdict is Verdict.MET:
            met.append(dependency)
    await _go_on(conn, [each for each in met if each.job_id not in broken], targets, now)
    await _cancel(conn, [(waiting[job_id], target) for job_id, target in broken.items()], now)
    if met or broken:
        await notify(conn, "queue")
    return list(broken)


@dataclass(frozen=True, slots=True)
class Target:
    """What others wait for, a job or an array. `bad`: the job of it that failed or was cancelled."""

    id: UUID
    is_array: bool
    is_open: bool
    bad: Row[Any] | None

    @property
    def name(self) -> str:
        return ids.encode("array" if self.is_array else "job", self.id)


async def _targets(conn: AsyncConnection, over: Sequence[Row[Any]]) -> Mapping[UUID, Target]:
    """What somebody waits for of what these jobs are."""
    arrays = {row.array_id for row in over if row.as_array}
    on_ids = arrays | {row.job_id for row in over if row.itself}
    open_ = await still_open(conn, on_ids)
    bad: dict[UUID, Row[Any]] = dict(await bad_of_arrays(conn, {id_ for id_ in arrays if not open_[id_]}))
    for row in over:
        if row.state in BAD:
            bad |= {id_: row for id_ in (row.job_id, row.array_id) if id_ is not None}
    return {id_: Target(id_, id_ in arrays, open_[id_], bad.get(id_)) for id_ in on_ids}


async def _go_on(conn: AsyncConnection, met: Sequence[Row[Any]], targets: Mapping[UUID, Target], now: datetime) -> None:
    left = await forget_met(conn, met)
    last = {dependency.job_id: targets[dependency.on_id] for dependency in met}
    told: dict[tuple[UUID, int], list[UUID]] = {}
    for job_id, target in last.items():
        told.setdefault((target.id, left[job_id]), []).append(job_id)
    for (target_id, more), job_ids in told.items():
        target = targets[target_id]
        over = f"All jobs of {target.name} are over" if target.is_array else f"{target.name} is over"
        message = f"{over}; {_more(more)}."
        data = {"on": target.name, "unmet": more}
        event = Event(at=now, kind=EventKind.DEPENDENCY_MET.value, message=message, data=data)
        await record_alike(conn, job_ids, event)


def _more(count: int) -> str:
    return f"it waits for {count} more" if count else "it waits for nothing else"


async def _cancel(conn: AsyncConnection, broken: Sequence[tuple[Row[Any], Target]], now: datetime) -> None:
    """Cancel waiting jobs, locked, each with the target that failed it."""
    if not broken:
        return
    state = advance(JobState.QUEUED, JobState.CANCELLED)
    events: list[Event] = []
    notices: list[Notice] = []
    for said, rows in _alike(broken).items():
        values = {"state": state, "finished_at": now, "reason": REASON, "message": said, "unmet": 0}
        await change_jobs(conn, [row.id for row in rows], values)
        events += [
            Event(at=now, kind=EventKind.CANCELLED, message=f"Cancelled: {said}.", job_id=row.id, data={"why": REASON})
            for row in rows
        ]
        notices += [
            state_notice(r.id, name=r.name, tenant=r.tenant, state=state, attempt=r.attempts, message=said, now=now)
            for r in rows
        ]
    job_ids = [row.id for row, _ in broken]
    await forget_all(conn, job_ids)
    await delete_holds(conn, job_ids)
    await record_events(conn, events)
    await post_notices(conn, notices, now=now)
    await notify(conn, *(f"job:{job_id.hex}" for job_id in job_ids))


def _alike(broken: Sequence[tuple[Row[Any], Target]]) -> Mapping[str, list[Row[Any]]]:
    """By what is said of them. The name of a job is told within its own tenant alone."""
    alike: dict[str, list[Row[Any]]] = {}
    for row, target in broken:
        bad = target.bad
        assert bad is not None
        named = f"{bad.name} ({ids.encode('job', bad.job_id)})" if bad.tenant == row.tenant else f"job_{bad.job_id.hex}"
        verb = "failed" if bad.state == JobState.FAILED else "was cancelled"
        alike.setdefault(f"dependency failed: {named} {verb}", []).append(row)
    return alike
