"""What becomes of a plan: carried out at once, in the midst of it, and over several passes."""

from collections.abc import Iterator
from dataclasses import replace

from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.snapshot import Job, Seat, Snapshot


def started(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The snapshot with what the plan starts running, and what it keeps kept."""
    starts = {s.job: s for s in plan.starts}
    kept = {h.job: h.kept for h in plan.holds if h.kept}
    now = snapshot.now
    return replace(snapshot, jobs=tuple(_settled(j, starts.get(j.id), kept.get(j.id), now) for j in snapshot.jobs))


def _settled(job, start, kept, now):
    if start is not None:
        return replace(
            job,
            state="running",
            kept=None,
            started_at=now,
            gpu_type=start.gpu_type,
            placement=start.placement,
        )
    return job if kept is None else replace(job, kept=kept)


def carried_out(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The snapshot with what the plan starts running, what it keeps kept, and who gives way stopping."""
    victims = {p.job: p.for_job for p in plan.preemptions}
    moves = {m.job: m for m in (*plan.resizes, *plan.migrations)}
    jobs = []
    for job in started(snapshot, plan).jobs:
        if job.id in victims:
            job = replace(job, state="stopping", for_job=victims[job.id])
        elif job.id in moves:
            move = moves[job.id]
            goes_on = Seat(gpu_type=type_of(snapshot, job), placement=move.placement)
            job = replace(job, state="stopping", for_job=move.for_job, next=goes_on)
        jobs.append(job)
    return replace(snapshot, jobs=tuple(jobs))


def type_of(snapshot: Snapshot, job: Job) -> str | None:
    if not job.gpus_per_replica:
        return None
    return job.gpu_type or next(n.gpu_type for n in snapshot.nodes if n.name == job.placement[0].node)


def stopped(snapshot: Snapshot, *, back_in_queue: bool = False) -> Snapshot:
    """The snapshot when all that is stopping has stopped, and goes on at its `next`, or is gone or waits again."""
    jobs = []
    for job in snapshot.jobs:
        if job.state != "stopping":
            jobs.append(job)
        elif job.next is not None:
            jobs.append(
                replace(
                    job,
                    state="running",
                    placement=job.next.placement,
                    next=None,
                    for_job=None,
                    started_at=snapshot.now,
                )
            )
        elif back_in_queue:
            waits = {"state": "queued", "placement": (), "for_job": None, "gpu_type": None}
            jobs.append(replace(job, started_at=None, checkpointed_at=None, protected_until=None, **waits))
    return replace(snapshot, jobs=tuple(jobs))


def rounds(snapshot: Snapshot, *, most: int = 10, pause_s: float = 60.0) -> Iterator[Plan]:
    """One plan after the other: each is carried out, whoever was evicted waits again, and a while goes by."""
    for _ in range(most):
        plan = schedule(snapshot)
        yield plan
        after = stopped(carried_out(snapshot, plan), back_in_queue=True)
        snapshot = replace(after, now=snapshot.now + pause_s)
