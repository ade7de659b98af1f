"""How long jobs are expected to run: the history of those that ended, read from the database, and the predictions laid
over what a pass may know.

Owns the reading of the history (bounded: the newest of each way to end) and when a prediction is made anew. Refuses to
predict (`scheduling.predict` does) and to decide. A snapshot or changes go through a `Forecast` on their way to the
planner; with nothing learnt they go through as they are.

* A job's prediction stays until its job is queued or started again, until a running job has outlived it, or until so
  much was learnt that it is worth the while to predict anew for all that wait. Jobs that are alike are told the same in
  between, so that they stay in one class of the queue.
* What a job ran is counted as if with the replicas that it prefers.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.predict import Expectation, Predictor, Work, rounded
from phalanx_server.scheduling.snapshot import Changes, Job, Policy, Snapshot, time_limit_of
from phalanx_server.scheduling.speedup import progress
from phalanx_server.scheduling.world import expected_ends

HISTORY_JOBS = 4_000
"""Of each way to end the newest: groups keep no more than the last 128 anyway."""
REFRESH_S = 300.0
"""From time to time for all that wait, however little was learnt."""
RETOLD_MAX = 2_000
"""Of so many that wait a pass is told anew at most; the others' turn is in the passes that follow."""


Interval = tuple[float, float]
"""In four cases of five between these two times."""
_SAME_S = 0.5


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that ran and ended, how long it ran at the replicas that it prefers, and what had been expected when it
    first started."""

    job: str
    work: Work
    run_s: float
    said: Expectation | None = None


class _Ends:
    """When running jobs are expected to end, and the intervals of those that are asked for, each made once."""

    def __init__(self, ends_at: Mapping[str, float], interval_of: Callable[[str], Interval]) -> None:
        self._ends = sorted((end, name) for name, end in ends_at.items())
        self._interval_of = cache(interval_of)

    def about(self, at: float) -> Iterator[Interval]:
        """Of all that are expected to end at about this time."""
        first = bisect_right(self._ends, (at - _SAME_S, chr(0x10FFFF)))
        for end, name in islice(self._ends, first, None):
            if end >= at + _SAME_S:
                return
            yield self._interval_of(name)


_ENDS = """
    SELECT j.id, j.finished_at, t.path AS tenant, j.created_by, j.name, j.array_index,
           CAST(j.spec->'resources'->>'replicas' AS integer) AS replicas,
           CAST(j.spec->'resources'->>'gpus_per_replica' AS integer) AS gpus,
           CAST(j.spec->>'time_limit' AS double precision) AS time_limit, past.tried, past.seconds,
           f.run_s, f.run_low_s, f.run_high_s
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id LEFT JOIN forecasts f ON f.job_id = j.id CROSS JOIN LATERAL (
        SELECT array_agg(a.replicas) AS tried,
               array_agg(extract(epoch FROM a.ended_at - coalesce(a.started_at, a.created_at))) AS seconds
        FROM attempts a WHERE a.job_id = j.id AND a.ended_at IS NOT NULL
    ) past
"""
NEWEST = " UNION ALL ".join(
    f"(SELECT id FROM jobs WHERE state = '{state}' AND attempts > 0 AND finished_at IS NOT NULL"
    " ORDER BY id DESC LIMIT :most)"
    for state in ("succeeded", "failed", "cancelled")
)
_HISTORY = text(f"{_ENDS} WHERE j.id IN ({NEWEST}) AND past.tried IS NOT NULL ORDER BY j.finished_at, j.id")
_ENDS_OF = text(
    f"{_ENDS} WHERE j.id = ANY(CAST(:ids AS uuid[])) AND past.tried IS NOT NULL ORDER BY j.finished_at, j.id"
)


async def load_history(conn: AsyncConnection, *, most: int = HISTORY_JOBS) -> list[Ended]:
    """The newest jobs that ran and ended, in the order in which they ended."""
    return [_ended(row) for row in await conn.execute(_HISTORY, {"most": most})]


async def load_ends(conn: AsyncConnection, jobs: Iterable[str]) -> list[Ended]:
    """Of these jobs, which are over, those that ran, in the order in which they ended."""
    ids = [UUID(hex=job) for job in jobs]
    return [_ended(row) for row in await conn.execute(_ENDS_OF, {"ids": ids})] if ids else []


def _ended(row: Row[Any]) -> Ended:
    work = work_of(row, gpus=row.replicas * row.gpus, time_limit_s=row.time_limit)
    prefers = progress(_ANY, row.replicas)
    run_s = sum(
        float(seconds) * progress(_ANY, replicas) / prefers
        for seconds, replicas in zip(row.seconds, row.tried, strict=True)
    )
    said = None if row.run_s is None else Expectation(row.run_s, row.run_low_s, row.run_high_s)
    return Ended(row.id.hex, work, max(0.0, run_s), said)


def work_of(row: Row[Any], *, gpus: int, time_limit_s: float | None) -> Work:
    """What a job's row says before it runs. The jobs of an array have one name."""
    name = row.name if row.array_index is None else row.name.rpartition("[")[0] or row.name
    return _work(row.tenant, gpus, row.created_by, name, time_limit_s)


# Many jobs are alike: one object for all of them.
@lru_cache(maxsize=16_384)
def _work(tenant: str, gpus: int, user: str, name: str, time_limit_s: float | None) -> Work:
    return Work(tenant=tenant, gpus=gpus, user=user, name=name, time_limit_s=time_limit_s)


_ANY = Job(id="", tenant="", replicas=1, gpus_per_replica=0, submitted_at=0.0, state="queued")


def learnt(history: Iterable[Ended]) -> Predictor:
    """A predictor that has seen these jobs end."""
    predictor = Predictor()
    for each in history:
        predictor.observe(each.work, each.run_s, each.said)
    return predictor


class Forecast:
    """What a planner was told of each job's run time, and what it is to be told next."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._jobs: dict[str, Job] = {}
        """Those that wait or run, as the planner knows them."""
        self._works: Mapping[str, Work] = {}
        self._to_retell: deque[str] = deque()
        self._outlived: list[tuple[float, str]] = []
        self._outlives_at: dict[str, float] = {}
        self._ends_at: dict[str, float] = {}
        """When running jobs are expected to end, by prediction or by limit."""
        self._known: dict[tuple[Work, float], float | None] = {}
        self._edition = -1
        self._refreshed_at = float("-inf")
        self._now = 0.0
        self._policy = Policy()

    def begin(self, snapshot: Snapshot, works: Mapping[str, Work]) -> Snapshot:
        """The whole snapshot with predictions; cheapest if it was loaded with `predicted_s`. `works`: what is known of
        each job before it runs, by the job's name."""
        self._policy = snapshot.policy
        self._turn(snapshot.now, works)
        told = {job.id: self._tell(job) for job in snapshot.jobs}
        told |= {job.id: job for job in self._outliving()}
        return replace(snapshot, jobs=tuple(told.values()))

    def follow(self, changes: Changes, works: Mapping[str, Work], ended: Sequence[Ended]) -> Changes:
        """The changes with predictions, and with the jobs of which something else is expected now."""
        for each in ended:
            self.predictor.observe(each.work, each.run_s, each.said)
        self._policy = changes.policy or self._policy
        is_anew = self._turn(changes.now, works)
        told = {job.id: self._tell(job) for job in changes.jobs}
        for name in changes.removed_jobs:
            self._jobs.pop(name, None)
            self._outlives_at.pop(name, None)
            self._ends_at.pop(name, None)
        if is_anew and not self._to_retell:
            self._to_retell.extend(job.id for job in self._jobs.values() if job.state == "queued")
        for _ in range(min(RETOLD_MAX, len(self._to_retell))):
            job = self._jobs.get(self._to_retell.popleft())
            if job is None or job.state != "queued" or job.id in told:
                continue
            if (again := self._tell(job)) is not job:
                told[job.id] = again
        told |= {job.id: job for job in self._outliving()}
        return replace(changes, jobs=tuple(told.values()))

    def predicted(self, jobs: Iterable[Job], works: Mapping[str, Work]) -> tuple[Job, ...]:
        """Other jobs, which wait, with their predictions. Nothing is remembered."""
        return tuple(
            replace(job, predicted_s=self.predicted_s(works[job.id], job.done_s)) if job.id in works else job
            for job in jobs
        )

    def over(self, snapshot: Snapshot) -> Snapshot:
        """Another snapshot of the same moment with what the planner was told."""
        told = {name: job.predicted_s for name, job in self._jobs.items()}
        jobs = tuple(replace(job, predicted_s=told.get(job.id)) for job in snapshot.jobs)
        return replace(snapshot, jobs=jobs)

    def expectation(self, work: Work, attained_s: float = 0.0) -> Expectation | None:
        """What history says; None where there is none, whatever the time limit says."""
        return self.predictor.expect(work, attained_s) if self.predictor.edition else None

    def starting(self, plan: Plan) -> dict[str, Expectation]:
        """How long the jobs that a plan starts for the first time are expected to run."""
        said: dict[str, Expectation] = {}
        for start in plan.starts:
            work = self._works.get(start.job)
            if work is not None and (expected := self.expectation(work)) is not None:
                said[start.job] = expected
        return said

    def start_intervals(self, plan: Plan) -> dict[str, Interval]:
        """Between when and when the jobs that wait with an expected start of their own start in four cases of five. A
        time that a cause itself says is sure; else the start waits for somebody's expected end, whose interval it
        takes. Jobs of which nothing tells are left out."""
        intervals: dict[str, Interval] = {}
        running = _Ends(self._ends_at, self._interval_of_running)
        ends = [self._end_of(start.job, (self._now, self._now)) for start in plan.starts]
        looked = [group for group in plan.hold_groups if group.estimated_start is not None]
        for group in sorted(looked, key=lambda group: group.estimated_start or 0.0):
            at = group.estimated_start
            assert at is not None, "chosen so"
            sure = group.explanation.estimated_start is not None
            interval = (at, at) if sure else self._interval_at(at, ends, running)
            if interval is None:
                continue
            intervals |= dict.fromkeys(group.jobs, interval)
            ends += [self._end_of(job, interval, starts_at=at) for job in group.jobs[:1]]
        return intervals

    def _interval_at(self, at: float, ends: Sequence[tuple[float, Interval] | None], running: _Ends) -> Interval | None:
        found = [end[1] for end in ends if end is not None and abs(end[0] - at) < _SAME_S]
        found += running.about(at)
        if not found:
            return None
        low, high = max(low for low, _ in found), max(high for _, high in found)
        return max(self._now, min(low, at)), max(high, at)

    def _interval_of_running(self, name: str) -> Interval:
        began = self._jobs[name].started_at or self._now
        return self._run_interval(self._jobs[name], began=(began, began))

    def _end_of(self, name: str, began: Interval, *, starts_at: float | None = None) -> tuple[float, Interval] | None:
        """When a job that begins then is expected to end, and the interval of that."""
        job = self._jobs.get(name)
        if job is None:
            return None
        run_s = [job.predicted_s - job.done_s] if job.predicted_s is not None else []
        limit_s = time_limit_of(job, self._policy)
        run_s += [limit_s] if limit_s is not None else []
        if not run_s:
            return None
        at = began[0] if starts_at is None else starts_at
        return at + max(0.0, min(run_s)), self._run_interval(job, began=began)

    def _run_interval(self, job: Job, *, began: Interval) -> Interval:
        """Between when and when it ends that begins between these."""
        attained_s = _attained_s(job, self._now) if job.state == "running" else job.done_s
        limit_s = time_limit_of(job, self._policy)
        said = self.expectation(self._works[job.id], attained_s)
        if said is None:
            return began[0], began[1] + (0.0 if limit_s is None else limit_s)
        low_s, high_s = ((each - job.done_s) / _pace(job) for each in (said.low_s, said.high_s))
        most_s = float("inf") if limit_s is None else limit_s
        return began[0] + max(0.0, min(low_s, most_s)), began[1] + max(0.0, min(high_s, most_s))

    def _turn(self, now: float, works: Mapping[str, Work]) -> bool:
        """A new moment; is it one to predict anew for all that wait?"""
        self._now, self._works = now, works
        if self._edition == self.predictor.edition and now < self._refreshed_at + REFRESH_S:
            return False
        self._edition, self._refreshed_at = self.predictor.edition, now
        self._known.clear()
        return True

    def _tell(self, job: Job) -> Job:
        """The job with its prediction, remembered. What a lost attempt still holds has none."""
        work = self._works.get(job.id)
        if work is None:
            return job
        before = self._jobs.get(job.id)
        goes_on = before is not None and before.state == "running" and before.started_at == job.started_at
        if before is not None and job.state != "queued" and (goes_on or job.state == "stopping"):
            predicted_s = before.predicted_s
        else:
            predicted_s = self.predicted_s(work, job.done_s)
        return self._remember(job if predicted_s == job.predicted_s else replace(job, predicted_s=predicted_s))

    def predicted_s(self, work: Work, attained_s: float) -> float | None:
        """How long such a job will run in all that has run so long; jobs that are alike are told the same."""
        key = work, attained_s
        if key not in self._known:
            said = self.expectation(work, attained_s)
            self._known[key] = None if said is None else _beyond(said.predicted_s, attained_s)
        return self._known[key]

    def _remember(self, job: Job) -> Job:
        self._jobs[job.id] = job
        ends = expected_ends(job, self._policy) if job.state == "running" else []
        if ends:
            self._ends_at[job.id] = ends[0]
        else:
            self._ends_at.pop(job.id, None)
        at = _outlives_at(job)
        if at is None:
            self._outlives_at.pop(job.id, None)
        elif self._outlives_at.get(job.id) != at:
            self._outlives_at[job.id] = at
            heapq.heappush(self._outlived, (at, job.id))
        return job

    def _outliving(self) -> list[Job]:
        """Running jobs that have run longer than was expected, with what is expected of them now."""
        told: list[Job] = []
        while self._outlived and self._outlived[0][0] <= self._now:
            at, name = heapq.heappop(self._outlived)
            if self._outlives_at.get(name) != at:
                continue
            job, work = self._jobs[name], self._works[name]
            attained_s = _attained_s(job, self._now)
            said = self.expectation(work, attained_s)
            if said is not None:
                predicted_s = _beyond(said.predicted_s, attained_s)
                told.append(self._remember(replace(job, predicted_s=predicted_s)))
        return told


def _pace(job: Job) -> float:
    """How fast it runs, by how fast it would with the replicas that it prefers."""
    return progress(job, job.placed) / progress(job, job.replicas) if job.placement else 1.0


def _attained_s(job: Job, now: float) -> float:
    assert job.started_at is not None, "it runs"
    return job.done_s + max(0.0, now - job.started_at) * _pace(job)


def _outlives_at(job: Job) -> float | None:
    if job.state != "running" or job.predicted_s is None or job.started_at is None:
        return None
    return job.started_at + max(0.0, job.predicted_s - job.done_s) / _pace(job)


def _beyond(predicted_s: float, attained_s: float) -> float:
    """Rounding must not make a job's end one that has passed."""
    return predicted_s if predicted_s > attained_s * 1.01 else rounded(attained_s * 1.1 + 1.0)
