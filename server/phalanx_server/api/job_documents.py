"""A job as the API shows it: the documents of jobs, attempts, holds and events, made from rows.

Owns their shapes and the phases from submit to first step. Refuses to query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from pydantic import BaseModel, Field
from sqlalchemy import Row

from phalanx_server.actions.submit_jobs import NewJob
from phalanx_server.domain.array import size_of
from phalanx_server.store import ids
from phalanx_server.store.speeds import figures_of, speedup_in

JobRow: TypeAlias = Any
"""A row of `store.job_views`, or an `actions.submit_jobs.NewJob`, which has the same columns."""


class Hold(BaseModel):
    """Why a waiting job does not start, what would end the wait, and when it is expected to start: in four cases of
    five between `estimated_start_low` and `estimated_start_high`. Null: nothing known tells."""

    reason: str
    message: str
    unblocks: list[str]
    estimated_start: datetime | None
    estimated_start_low: datetime | None = None
    estimated_start_high: datetime | None = None
    since: datetime | None


class Phases(BaseModel):
    """Submit to first optimizer step in seconds, in parts that add up to `total_s`; null = not reached yet."""

    accepted_s: float | None = None
    queued_s: float | None = None
    placed_s: float | None = None
    ranks_started_s: float | None = None
    rendezvous_s: float | None = None
    first_step_s: float | None = None
    total_s: float | None = None


class Placement(BaseModel):
    """The replicas of an attempt that share a node; their ranks are `first_rank .. first_rank + ranks - 1`."""

    node: str
    replicas: int
    gpu_indices: list[int]
    first_rank: int
    ranks: int
    address: str


class NextItem(BaseModel):
    """So many replicas on one node."""

    node: str
    replicas: int


class NextPlace(BaseModel):
    """Where a job goes on that is resized or moved."""

    gpu_type: str | None
    placement: list[NextItem]


class Attempt(BaseModel):
    """One try at running a job."""

    id: str
    number: int
    epoch: int
    state: str
    outcome: str | None
    message: str | None
    cluster: str
    gpu_type: str
    replicas: int
    resume_from: str | None = Field(description="The checkpoint that it was told to go on from.")
    created_at: datetime
    gang_ready_at: datetime | None
    started_at: datetime | None
    rendezvous_at: datetime | None
    first_step_at: datetime | None
    stop_cause: str | None
    stop_reason: str | None = Field(
        description="Why it was preempted, as in a plan: `within_tenant`, `reclaim`, …; or `shutdown`, of Phalanx."
    )
    stop_for: str | None = Field(description="The job that it gave way to; null, too, where that is not to be seen.")
    next: NextPlace | None = Field(description="Where the job was to go on when it was resized or moved.")
    stop_requested_at: datetime | None
    ended_at: datetime | None
    placements: list[Placement]
    ranks: list[dict[str, Any]] = Field(description="How each rank was started: node, pid, warm or why not.")
    exits: list[dict[str, Any]] = Field(description="How each rank ended: exit code or signal, end of its stderr.")
    phases: Phases


class Progress(BaseModel):
    """What the job last reported about itself."""

    step: int | None
    total_steps: int | None
    values: dict[str, Any]
    at: datetime


class Speed(BaseModel):
    """How fast an elastic job is with so many replicas: progress per second of its steady running. Tokens if it reports
    `tokens_per_s`, else samples (`samples_per_s`, or `global_batch` and steps), else steps."""

    gpu_type: str | None
    replicas: int
    per_s: float | None = Field(description="Null: only an earlier job of the same tenant, user and name ran so.")
    unit: str | None = Field(description="`tokens_per_s`, `samples_per_s` or `steps_per_s`.")
    relative: float | None = Field(
        description="To one replica, as passes weigh growth by it. Null: with one number of replicas alone they do by a"
        " prior, and a figure in another unit is passed over."
    )
    measured_s: float = Field(description="Of how many seconds; an hour at most, in which what is older fades.")


class LastCheckpoint(BaseModel):
    """The last checkpoint that was registered as complete."""

    url: str
    step: int
    at: datetime


class ArrayPlace(BaseModel):
    """Which job of which array it is."""

    id: str
    index: int
    size: int = Field(description="Jobs of the array.")
    max_running: int | None = Field(description="So many of them run at once; null = as many as fit.")


class Job(BaseModel):
    id: str
    name: str
    tenant: str
    state: str
    reason: str | None
    message: str | None
    priority: int
    spec: dict[str, Any] = Field(description="The job file as it was understood, in seconds and bytes.")
    labels: dict[str, str]
    received_at: datetime
    submitted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    held: bool
    hold: Hold | None
    position: int | None = Field(description="Place in the queue; only where one job is asked for, and it waits.")
    attempts: int
    failures: int
    attempt: Attempt | None = Field(description="The latest attempt.")
    progress: Progress | None
    speeds: list[Speed] = Field(description="Of elastic jobs, by GPU type and number of replicas.")
    checkpoint: LastCheckpoint | None
    phases: Phases | None
    bundle: str | None
    created_by: str
    version: int
    array: ArrayPlace | None
    warnings: list[str] = Field(description="What its owner should know, such as a deadline that it will miss.")


class AcceptedJob(Job):
    """A job as the answer to its submit."""

    warnings: list[str] = Field(description="What was accepted and may not be as it was meant.")


class Event(BaseModel):
    """Something that happened to a job. Ids grow; they are the SSE ids too."""

    id: int
    kind: str
    at: datetime
    message: str
    data: dict[str, Any]
    attempt: str | None
    node: str | None


# ------------------------------------------------------------------ from rows


def job_document(row: JobRow, *, position: int | None = None) -> Job:
    """A row of store.job_views, or a job just accepted, as a document."""
    attempt = attempt_document(row.attempt, received_at=row.received_at, submitted_at=row.submitted_at)
    return Job(
        id=ids.encode("job", row.id),
        name=row.name,
        tenant=row.tenant,
        state=row.state,
        reason=row.reason,
        message=row.message,
        priority=row.priority,
        spec=row.spec,
        labels=row.labels,
        received_at=row.received_at,
        submitted_at=row.submitted_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        cancel_requested_at=row.cancel_requested_at,
        held=row.held,
        hold=hold_document(row),
        position=position,
        attempts=row.attempts,
        failures=row.failures,
        attempt=attempt,
        progress=_progress(row),
        speeds=speed_documents(row.speeds),
        checkpoint=_checkpoint(row),
        phases=attempt.phases if attempt else None,
        bundle=row.bundle,
        created_by=row.created_by,
        version=row.version,
        array=array_place(row, row.spec.get("array")),
        warnings=too_late(row.estimated_start, _time(row.spec.get("deadline"))),
    )


def array_place(row: Any, asked: Mapping[str, Any] | None) -> ArrayPlace | None:
    """Of a row with `array_id` and `array_index`; `asked` is the spec's `array`."""
    if row.array_id is None or asked is None:
        return None
    return ArrayPlace(
        id=ids.encode("array", row.array_id),
        index=row.array_index,
        size=size_of(asked["indices"]),
        max_running=asked["max_running"],
    )


def too_late(expected: datetime | None, deadline: datetime | None) -> list[str]:
    """The warning of a job that is expected to start only after its deadline."""
    if expected is None or deadline is None or expected <= deadline:
        return []
    return [f"is expected to start at {expected:{_SHOWN}}, after its deadline, {deadline:{_SHOWN}}"]


_SHOWN = "%Y-%m-%dT%H:%M:%SZ"


def accepted_document(job: NewJob) -> AcceptedJob:
    return AcceptedJob(**{**dict(job_document(job)), "warnings": list(job.warnings)})


def hold_document(row: JobRow) -> Hold | None:
    if row.hold_reason is None:
        return None
    return Hold(
        reason=row.hold_reason,
        message=row.hold_message,
        unblocks=row.unblocks,
        estimated_start=row.estimated_start,
        estimated_start_low=row.estimated_start_low,
        estimated_start_high=row.estimated_start_high,
        since=row.hold_since,
    )


def _progress(row: JobRow) -> Progress | None:
    if row.progress_at is None:
        return None
    return Progress(step=row.step, total_steps=row.total_steps, values=row.values, at=row.progress_at)


def speed_documents(told: Sequence[Sequence[Any]] | None) -> list[Speed]:
    """Figures as `store.speeds` reads them."""
    relative = {each.gpu_type: speedup_in(told, each.gpu_type) or {} for each in figures_of(told)}
    return [
        Speed(
            gpu_type=each.gpu_type or None,
            replicas=each.replicas,
            per_s=each.speed,
            unit=each.unit,
            relative=relative[each.gpu_type].get(str(each.replicas)),
            measured_s=round(each.seconds, 1),
        )
        for each in figures_of(told)
    ]


def _checkpoint(row: JobRow) -> LastCheckpoint | None:
    if row.checkpoint_url is None:
        return None
    return LastCheckpoint(url=row.checkpoint_url, step=row.checkpoint_step, at=row.checkpoint_at)


_TIMES = (
    "created_at",
    "gang_ready_at",
    "started_at",
    "rendezvous_at",
    "first_step_at",
    "stop_requested_at",
    "ended_at",
)


def attempt_document(
    stored: Mapping[str, Any] | None, *, received_at: datetime, submitted_at: datetime
) -> Attempt | None:
    """An attempt as the store gives it (JSON) as a document."""
    if stored is None:
        return None
    times = {name: _time(stored[name]) for name in _TIMES}
    queued_at = _time(stored["requeued_at"]) or submitted_at
    fields = {name: stored[name] for name in Attempt.model_fields if name in stored}
    timeline = phases(received_at if stored["number"] == 1 else None, queued_at, times)
    named = {"id": _named("attempt", stored["id"]), "stop_for": _named("job", stored["stop_for"])}
    return Attempt(**{**fields, **times, **named, "phases": timeline})


def _named(kind: str, text: str | None) -> str | None:
    return None if text is None else f"{ids.PREFIXES[kind]}_{text.replace('-', '')}"


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def phases(received_at: datetime | None, queued_at: datetime, times: Mapping[str, datetime | None]) -> Phases:
    """The way of one attempt from its submit (`received_at`; None for a later attempt, which starts at its return to
    the queue) to its first step. A mark that comes before the one it must follow (marks are taken by several clocks)
    counts as simultaneous, and one that a job never sets is skipped, so the parts always add up.
    """
    marks = (
        ("accepted_s", queued_at if received_at else None),
        ("queued_s", times["created_at"]),
        ("placed_s", times["gang_ready_at"]),
        ("ranks_started_s", times["started_at"]),
        ("rendezvous_s", times["rendezvous_at"]),
        ("first_step_s", times["first_step_at"]),
    )
    parts: dict[str, float] = {}
    previous = received_at or queued_at
    for name, at in marks:
        if at is not None:
            reached = max(previous, at)
            parts[name] = round((reached - previous).total_seconds(), 6)
            previous = reached
    total_s = round(sum(parts.values()), 6) if "first_step_s" in parts else None
    return Phases(**parts, total_s=total_s)


def event_document(row: Row[Any]) -> Event:
    attempt = ids.encode("attempt", row.attempt_id) if row.attempt_id else None
    return Event(
        id=row.id, kind=row.kind, at=row.at, message=row.message, data=row.data, attempt=attempt, node=row.node
    )
