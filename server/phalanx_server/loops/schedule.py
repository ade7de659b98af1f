"""The scheduling loop: load what changed, plan, commit.

Owns the planner in memory, with what is expected of every job's run time, and when both are thrown away: on election,
when a commit says that another leads, when a decision is dropped that was dropped the time before too (the pass does
not learn why), and after any error. Refuses to decide anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from math import isfinite
from typing import TypeVar

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.commit_plan import Committed, commit_plan
from phalanx_server.actions.expect_lease import LeaseLost
from phalanx_server.domain.reason import date_of
from phalanx_server.loops.hold_book import HoldBook, Words
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pace, Pulse, tick_forever
from phalanx_server.scheduling.plan import Migration, Plan, Preemption, Resize
from phalanx_server.scheduling.planner import Planner, Size
from phalanx_server.scheduling.predict import Calibration
from phalanx_server.scheduling.snapshot import Changes, Policy
from phalanx_server.store.calibration import StartRecord
from phalanx_server.store.forecasts import Forecast, learnt, load_ends, load_history
from phalanx_server.store.holds import HoldRow, load_holds
from phalanx_server.store.leases import Lease
from phalanx_server.store.snapshots import Cursor, load_changes, load_snapshot, reading
from phalanx_server.store.usage import Usage
from phalanx_server.store.wakeups import Wakeups

log = structlog.get_logger()

Result = TypeVar("Result")

INTERVAL_S = 1.0
# Submits that arrive in crowds share passes: most of what a pass costs then does not depend on their number.
PASSES_BURST, PASSES_EVERY_S = 5, 0.05
SLOW_PASS_S = 1.0
# A commit locks the lease, which must be renewed in time: so many starts take about a second.
STARTS_MAX = 2_000
# So many jobs give way in one commit, and all that give way for the first of the waiting jobs.
STOPS_MAX = 500
# From so many queued jobs on a pass runs in a thread, so that the lease is renewed beside it.
THREAD_JOBS = 2_000


@dataclass
class Memory:
    """The planner under one lease, and how far it has read."""

    lease: Lease
    planner: Planner
    forecast: Forecast
    cursor: Cursor
    changes: int
    """How many jobs, nodes and tenants the last pass read."""
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass: its plan, and what became of it. `queued` jobs waited when it began, and `changes` were read."""

    plan: Plan
    committed: Committed
    seconds: float
    size: Size
    queued: int
    changes: int


class ScheduleLoop:
    """`tick` is one pass; it does nothing while another process leads."""

    def __init__(
        self,
        engine: AsyncEngine,
        leader: Leader,
        *,
        policy: Policy,
        wakeups: Wakeups | None = None,
        told: Callable[[Pass], object] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._leader = leader
        self._policy = policy
        self._wakeups = wakeups
        self._memory: Memory | None = None
        self._usage: Usage | None = None  # stays right whatever becomes of the memory
        self._told = told
        self.holds = HoldBook()
        self.starts = StartRecord()
        self.runs = Calibration()
        self.pulse = Pulse()
        self.last: Pass | None = None
        """The last pass under the lease that is held."""
        self.pause_s = INTERVAL_S
        """How long to wait for a wakeup before the next tick: not at all while a part of the plan waits."""

    async def tick(self, now: datetime) -> Pass | None:
        """Load → plan → commit. None while another process leads."""
        self.pause_s = INTERVAL_S
        lease = self._leader.lease
        if lease is None:
            self._memory = self.last = None
            return None
        started = time.perf_counter()
        memory, self._memory = self._memory, None  # whatever goes wrong from here on, the next tick starts afresh
        if memory is None or memory.lease != lease:
            memory, plan = await self._load(lease, now)
        else:
            plan = await self._advance(memory, now)
        committed = await self._commit(memory, plan, now)
        if committed is None:
            return None
        if not memory.dropped & committed.dropped.keys():
            self._memory = memory
        memory.dropped = frozenset(committed.dropped)
        size, queued = memory.planner.size, len(memory.cursor.versions)
        return self._done(Pass(plan, committed, time.perf_counter() - started, size, queued, memory.changes))

    async def _load(self, lease: Lease, now: datetime) -> tuple[Memory, Plan]:
        async with reading(self._engine) as conn:
            history = await load_history(conn)
            forecast = Forecast(await _run(len(history), lambda: learnt(history)))
            snapshot, cursor = await load_snapshot(conn, now, self._policy, forecast.predicted_s, self._usage)
            stored = await load_holds(conn)
        self.holds.load(stored)
        self.starts.load(stored)
        self._usage = cursor.usage
        snapshot = await _run(len(snapshot.jobs), partial(forecast.begin, snapshot, cursor.works))
        planner = await _run(len(cursor.versions), lambda: Planner(snapshot))
        plan = await _run(len(cursor.versions), planner.plan)
        log.info("planner loaded", jobs=len(snapshot.jobs), nodes=len(snapshot.nodes), epoch=lease.epoch)
        read = len(snapshot.jobs) + len(snapshot.nodes) + len(snapshot.tenants)
        return Memory(lease, planner, forecast, cursor, read), plan

    async def _advance(self, memory: Memory, now: datetime) -> Plan:
        async with reading(self._engine) as conn:
            changes, cursor = await load_changes(conn, memory.cursor, now)
            ended = await load_ends(conn, [job for job in changes.removed_jobs if job in memory.cursor.works])
        changes = await _run(len(changes.jobs), partial(memory.forecast.follow, changes, cursor.works, ended))
        memory.cursor, memory.changes, self._usage = cursor, _count(changes), cursor.usage
        self.holds.keep(cursor.versions)
        self.starts.keep(cursor.versions)
        self.runs = memory.forecast.predictor.calibration
        return await _run(len(cursor.versions), lambda: memory.planner.apply(changes))

    async def _commit(self, memory: Memory, plan: Plan, now: datetime) -> Committed | None:
        cursor = memory.cursor
        part, later = _first_part(plan)
        news = self.holds.news(plan, kept=cursor.kept, tenant_of=cursor.tenant_of)
        news = [each for each in news if each[0].job_id.hex not in later]
        news = _with_intervals(news, plan, memory.forecast)
        if not (part.starts or part.preemptions or part.resizes or part.migrations or news):
            return Committed()
        try:
            committed = await commit_plan(
                self._engine,
                part,
                memory.lease,
                versions=cursor.versions,
                running=cursor.running,
                now=now,
                holds=[row for row, _ in news],
                expected=memory.forecast.starting(part),
                default_limit_s=cursor.policy.default_time_limit_s,
            )
        except LeaseLost as lost:
            log.warning("plan not committed", why=str(lost))
            return None
        stored = [each for each in news if each[0].job_id.hex not in committed.unheld]
        self.holds.stored(stored, over=committed.started)
        self.starts.told(row for row, _ in stored)
        self.starts.started(committed.started, now=now)
        if (len(plan.starts) > STARTS_MAX and committed.started) or (later and committed.stopped):
            self.pause_s = 0.0
        return committed

    def _done(self, done: Pass) -> Pass:
        self.last = done
        self._told(done)
        for job, why in done.committed.dropped.items():
            log.info("decision dropped", job=job, why=why)
        if done.seconds > SLOW_PASS_S:
            log.warning("slow pass", seconds=round(done.seconds, 3), starts=len(done.plan.starts))
        return done

    async def run_forever(self) -> None:
        """Woken by NOTIFY and by a timer."""
        if self._wakeups is None:
            await tick_forever(self.tick, lambda: asyncio.sleep(self.pause_s), name="schedule", pulse=self.pulse)
            return
        pace = Pace(burst=PASSES_BURST, every_s=PASSES_EVERY_S)
        async with self._wakeups.subscribe("queue") as subscription:

            async def wait() -> None:
                await subscription.wait(self.pause_s)
                await pace.turn()

            await tick_forever(self.tick, wait, name="schedule", pulse=self.pulse)


def _with_intervals(
    news: Sequence[tuple[HoldRow, Words]], plan: Plan, forecast: Forecast
) -> list[tuple[HoldRow, Words]]:
    """The holds, with between when and when those that have an expected start will start."""
    if not any(row.estimated_start for row, _ in news):
        return list(news)
    intervals = forecast.start_intervals(plan)

    def widened(row: HoldRow) -> HoldRow:
        interval = intervals.get(row.job_id.hex) if row.estimated_start else None
        if interval is None or not all(map(isfinite, interval)):
            return row
        low, high = map(date_of, interval)
        return replace(row, estimated_start_low=low, estimated_start_high=high)

    return [(widened(row), words) for row, words in news]


def _first_part(plan: Plan) -> tuple[Plan, frozenset[str]]:
    """As much of a plan as one commit takes; and the waiting jobs for which others give way only later, as the passes
    that follow at once decide again. What gives way for one job is never parted."""
    sizes = Counter(_for_whom(each) for each in (*plan.preemptions, *plan.resizes, *plan.migrations))
    taken: set[str] = set()
    room = STOPS_MAX
    for whom, size in sizes.items():
        if size <= room or not taken:
            taken.add(whom)
            room -= size
    part = replace(
        plan,
        starts=plan.starts[:STARTS_MAX],
        preemptions=tuple(each for each in plan.preemptions if _for_whom(each) in taken),
        resizes=tuple(each for each in plan.resizes if _for_whom(each) in taken),
        migrations=tuple(each for each in plan.migrations if _for_whom(each) in taken),
    )
    return part, frozenset(sizes.keys() - taken)


def _for_whom(decision: Preemption | Resize | Migration) -> str:
    return decision.for_job or decision.job


def _count(changes: Changes) -> int:
    lists = (changes.jobs, changes.removed_jobs, changes.nodes, changes.removed_nodes, changes.tenants or ())
    return sum(map(len, lists))


async def _run(jobs: int, work: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(work) if jobs >= THREAD_JOBS else work()
