"""Owns the replay: time goes from event to event, the planner is told what changed, and what it decides is carried out.

Refuses to decide anything: every start, stop, resize and move is the plan's. The plan is carried out in two steps, as
live: whoever is evicted, resized or moved is `stopping` for `stop_s`, and then gone or running at its `next`.
Passes happen when a job arrives, ends or has stopped, when a protection ends, and when the plan expects a start;
events of one moment share a pass. While nothing waits and nothing could grow or move there is nothing to decide, and
the pass is left out.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from phalanx_server.scheduling.plan import Plan, Start
from phalanx_server.scheduling.planner import Planner
from phalanx_server.scheduling.predict import Calibration, Expectation, Predictor, Work
from phalanx_server.scheduling.snapshot import Changes, Job, PlacementItem, Policy, Seat, Snapshot
from phalanx_server.scheduling.speedup import progress
from phalanx_server.simulation.course import Course
from phalanx_server.simulation.nouns import nodes_of, queued_job, tenants_of
from phalanx_server.simulation.trace import Cluster, Profiles, TraceJob

MOST_PASSES_AT_ONE_MOMENT = 1_000
END, STOPPED, OUTLIVED, PROTECTION, WAKE = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds besides the trace. `policy.restart_s` is what each start after a job's first costs. `stop_s`: how long
    a job takes to stop."""

    policy: Policy = field(default_factory=Policy)
    clairvoyant: bool = False
    profiles: Profiles = field(default_factory=dict)
    min_runtime_s: float = 0.0
    stop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What happened. `passes_s` is the wall time of each pass."""

    cluster: Cluster
    courses: Sequence[Course]
    preemptions: int
    resizes: int
    migrations: int
    passes_s: Sequence[float]
    calibration: Calibration


class Stuck(Exception):
    """Planning at one moment never came to rest."""


def replay(rows: Iterable[TraceJob], cluster: Cluster, rules: Rules) -> Replayed:
    """Run the trace to its end. Jobs that can never start are left queued. Raises Stuck."""
    return _Replay(list(rows), cluster, rules).run()


class _Replay:
    def __init__(self, rows: Sequence[TraceJob], cluster: Cluster, rules: Rules) -> None:
        self._rules, self._cluster = rules, cluster
        self._courses = [_course(row, cluster, rules) for row in rows]
        self._of = {course.job.id: i for i, course in enumerate(self._courses)}
        self._predictor = Predictor()
        self._now = rows[0].submit_s if rows else 0.0
        nodes, tenants = nodes_of(cluster), tenants_of(cluster, rows, rules.policy)
        self._type_of = {node.name: node.gpu_type for node in nodes}
        self._planner = Planner(Snapshot(now=self._now, policy=rules.policy, tenants=tenants, nodes=nodes))
        self._arrived = 0
        self._events: list[tuple[float, int, int, int]] = []  # time, kind, number of the course, its turn
        self._wakes = 0
        self._changed: dict[str, Job] = {}
        self._gone: list[str] = []
        self._kept: set[str] = set()
        self._queued: set[int] = set()
        self._edition = 0
        self._holding: set[int] = set()
        self._elastic = 0
        self._is_due = False
        self._preemptions = self._resizes = self._migrations = 0
        self._passes_s: list[float] = []
        self._passes_now = 0

    def run(self) -> Replayed:
        while (moment := self._next_moment()) is not None:
            self._passes_now = 0 if moment > self._now else self._passes_now + 1
            self._now = moment
            self._let_arrive()
            self._let_happen()
            if self._is_due and self._could_decide():
                self._carry_out(self._pass())
            self._is_due = False
        return Replayed(
            self._cluster,
            self._courses,
            self._preemptions,
            self._resizes,
            self._migrations,
            self._passes_s,
            self._predictor.calibration,
        )

    # ------------------------------------------------------------------ events

    def _next_moment(self) -> float | None:
        arrival = self._courses[self._arrived].row.submit_s if self._arrived < len(self._courses) else None
        event = self._events[0][0] if self._events else None
        return min((at for at in (arrival, event) if at is not None), default=None)

    def _let_arrive(self) -> None:
        courses = self._courses
        while self._arrived < len(courses) and courses[self._arrived].row.submit_s <= self._now:
            course = courses[self._arrived]
            self._arrived += 1
            self._enqueue(course)

    def _let_happen(self) -> None:
        while self._events and self._events[0][0] <= self._now:
            _, kind, number, turn = heappop(self._events)
            if kind == WAKE:
                self._is_due |= turn == self._wakes
            elif (course := self._courses[number]).turn == turn:
                self._happen(kind, course)

    def _happen(self, kind: int, course: Course) -> None:
        if kind == END:
            self._end(course)
        elif kind == STOPPED:
            self._stopped(course)
        elif kind == PROTECTION:
            self._is_due = True
        elif kind == OUTLIVED:
            self._predict(course)
            self._foresee_outliving(course)

    def _end(self, course: Course) -> None:
        course.end(self._now)
        self._predictor.observe(course.work, course.total_s, course.said)
        self._holding.discard(self._of[course.job.id])
        self._elastic -= course.is_elastic
        self._changed.pop(course.job.id, None)
        self._gone.append(course.job.id)
        self._is_due = True

    def _stopped(self, course: Course) -> None:
        following = course.stopped(self._now)
        if following is None:
            self._holding.discard(self._of[course.job.id])
            self._enqueue(course)
        else:
            self._run(course, following.gpu_type, following.placement)
        self._is_due = True

    def _enqueue(self, course: Course) -> None:
        self._queued.add(self._of[course.job.id])
        self._predict(course)
        self._is_due = True

    def _foresee(self, at: float, kind: int, course: Course) -> None:
        heappush(self._events, (at, kind, self._of[course.job.id], course.turn))

    def _tell(self, course: Course) -> None:
        self._changed[course.job.id] = course.job

    # ------------------------------------------------------------------ predictions

    def _expected(self, course: Course) -> Expectation | None:
        if self._rules.clairvoyant:
            return Expectation(course.total_s, course.total_s, course.total_s)
        return self._predictor.expect(course.work, course.attained_s(self._now))

    def _predict_anew(self) -> None:
        """Early on, each job that ends may tell much about the others."""
        if self._edition != self._predictor.edition and not self._rules.clairvoyant:
            self._edition = self._predictor.edition
            for number in self._queued:
                self._predict(self._courses[number])
            for number in self._holding:
                self._predict(self._courses[number])
                self._foresee_outliving(self._courses[number])

    def _predict(self, course: Course) -> None:
        expected = self._expected(course)
        if course.said is None:
            course.said = expected
        predicted_s = None if expected is None else expected.predicted_s
        if predicted_s != course.job.predicted_s:
            course.job = replace(course.job, predicted_s=predicted_s)
        self._tell(course)

    def _foresee_outliving(self, course: Course) -> None:
        """A prediction that is outlived is made anew; the next pass sees it."""
        if self._rules.clairvoyant or course.job.predicted_s is None:
            return
        at = course.attains_at(course.job.predicted_s)
        if self._now < at < course.ends_at:
            self._foresee(at, OUTLIVED, course)

    # ------------------------------------------------------------------ passes

    def _could_decide(self) -> bool:
        policy = self._rules.policy
        return bool(self._queued or (policy.elastic and self._elastic) or (policy.consolidation and self._holding))

    def _pass(self) -> Plan:
        self._predict_anew()
        if self._passes_now > MOST_PASSES_AT_ONE_MOMENT:
            raise Stuck(f"at {self._now:g} s planning never comes to rest; jobs {', '.join(list(self._changed)[:5])}")
        changes = Changes(now=self._now, jobs=tuple(self._changed.values()), removed_jobs=tuple(self._gone))
        began = time.perf_counter()
        plan = self._planner.apply(changes)
        self._passes_s.append(time.perf_counter() - began)
        self._changed.clear()
        self._gone.clear()
        return plan

    def _carry_out(self, plan: Plan) -> None:
        for start in plan.starts:
            self._start(self._course_of(start.job), start)
        for eviction in plan.preemptions:
            self._stop(eviction.job, eviction.for_job, None)
        for resize in plan.resizes:
            self._stop(resize.job, resize.for_job, self._seat(resize.placement))
        for move in plan.migrations:
            self._stop(move.job, move.for_job, self._seat(move.placement))
        self._preemptions += len(plan.preemptions)
        self._resizes += len(plan.resizes)
        self._migrations += len(plan.migrations)
        self._keep(plan)
        self._wake_for(plan)

    def _start(self, course: Course, start: Start) -> None:
        self._queued.discard(self._of[start.job])
        self._holding.add(self._of[start.job])
        self._elastic += course.is_elastic and not course.attempts
        self._kept.discard(start.job)
        self._run(course, start.gpu_type, start.placement)

    def _run(self, course: Course, gpu_type: str | None, placement: tuple[PlacementItem, ...]) -> None:
        course.start(self._now, gpu_type, placement, min_runtime_s=self._rules.min_runtime_s)
        self._foresee(course.ends_at, END, course)
        self._foresee_outliving(course)
        if course.job.protected_until is not None:
            self._foresee(course.job.protected_until, PROTECTION, course)
        self._tell(course)

    def _stop(self, job: str, for_job: str | None, following: Seat | None) -> None:
        course = self._course_of(job)
        course.stop(self._now, for_job, following)
        self._foresee(self._now + self._rules.stop_s, STOPPED, course)
        self._tell(course)

    def _keep(self, plan: Plan) -> None:
        """Queued jobs carry what the plan keeps for them, until another plan does not."""
        kept = {job: group.kept for group in plan.hold_groups if group.kept is not None for job in group.jobs}
        for job in self._kept | kept.keys():
            course = self._course_of(job)
            if course.job.state == "queued" and course.job.kept != kept.get(job):
                course.job = replace(course.job, kept=kept.get(job))
                self._tell(course)
        self._kept = set(kept)

    def _wake_for(self, plan: Plan) -> None:
        """A pass at the earliest start that the plan expects, unless nothing can come of it."""
        self._wakes += 1
        if not self._holding and self._arrived == len(self._courses):
            return
        starts = (group.estimated_start for group in plan.hold_groups)
        at = min((start for start in starts if start is not None and start > self._now), default=None)
        if at is not None:
            heappush(self._events, (at, WAKE, 0, self._wakes))

    def _course_of(self, job: str) -> Course:
        return self._courses[self._of[job]]

    def _seat(self, placement: tuple[PlacementItem, ...]) -> Seat:
        return Seat(gpu_type=self._type_of[placement[0].node], placement=placement)


def _course(row: TraceJob, cluster: Cluster, rules: Rules) -> Course:
    runtime_s = rules.profiles.get(row.model or "")
    job = queued_job(row, cluster, runtime_s)
    total_s = row.duration_s
    if runtime_s is not None and job.speedup is not None:
        total_s = runtime_s[1] / progress(job, job.replicas)
    elif rules.clairvoyant:
        job = replace(job, time_limit_s=total_s)
    work = Work(tenant=row.tenant, gpus=row.gpus, user=row.user, name=row.model, time_limit_s=row.time_limit_s)
    return Course(row, job, work, total_s=total_s, restart_s=rules.policy.restart_s)
