"""Jobs: submit, look, steer.

Owns the routes. The way of a submit through the database is `actions.submit_jobs`; documents are `job_documents`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

import pydantic_core
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AwareDatetime, Field, field_validator

from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.hold_job import hold_job, release_job
from phalanx_server.actions.requeue_job import requeue_job
from phalanx_server.actions.set_priority import set_priority
from phalanx_server.actions.submit_jobs import Accepted, NewJob, Submission
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import Given, body_as, job_body, jobs_body, takes
from phalanx_server.api.deps import (
    Looking,
    Services,
    Serving,
    Steering,
    Submitting,
    narrowed,
    now,
    parse_id,
    visible_job,
)
from phalanx_server.api.dry_run import DryRun, dry_run
from phalanx_server.api.errors import not_found
from phalanx_server.api.idempotency import REPLAYED, IdempotencyKey, idempotency_of
from phalanx_server.api.job_documents import (
    AcceptedJob,
    Attempt,
    Job,
    accepted_document,
    attempt_document,
    job_document,
)
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.job import JobState, priority_of
from phalanx_server.domain.spec import JobSpec
from phalanx_server.store import ids
from phalanx_server.store.job_views import JobFilter, list_jobs, load_attempts, load_job
from phalanx_server.store.queue_views import position_in_queue

router = APIRouter(tags=["jobs"])

LABELS_MAX = 16
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class JobBatch(Given):
    """Up to 1,000 job files: all are accepted, or none."""

    jobs: list[JobSpec]


# ------------------------------------------------------------------ submit


@router.post(
    "/v1/jobs",
    operation_id="submit_job",
    status_code=201,
    response_model=AcceptedJob,
    responses={200: {"model": DryRun, "description": "With `dry_run=true`: nothing was stored."}},
    openapi_extra=takes(JobSpec),
)
async def submit_job(
    request: Request,
    services: Serving,
    principal: Submitting,
    spec: Annotated[JobSpec, Depends(job_body)],
    dry_run_only: Annotated[bool, Query(alias="dry_run", description="Only check, and say what would happen.")] = False,
    idempotency_key: IdempotencyKey = None,
    traceparent: Annotated[str | None, Header(description="W3C trace context, handed down to the job.")] = None,
) -> Response:
    """Submit a job file. The answer comes when the job is durably stored. One with an `array` makes all of its jobs, in
    one transaction; the answer is the first of them."""
    if dry_run_only:
        return _json(await dry_run(services, principal, spec), status=200)
    accepted = await services.submitter.submit(
        Submission(
            specs=[spec],
            actor=principal.actor,
            received_at=request.scope["phalanx.received_at"],
            idempotency=await idempotency_of(request, principal, idempotency_key, operation="submit_job"),
            traceparent=_sane(traceparent),
            render=_render_one if idempotency_key else None,
        )
    )
    return _accepted(accepted, None if accepted.response is not None else accepted_document(accepted.jobs[0]))


@router.post(
    "/v1/jobs/batch",
    operation_id="submit_jobs",
    status_code=201,
    response_model=Page[AcceptedJob],
    openapi_extra=takes(JobBatch),
)
async def submit_jobs(
    request: Request,
    services: Serving,
    principal: Submitting,
    specs: Annotated[list[JobSpec], Depends(jobs_body)],
    idempotency_key: IdempotencyKey = None,
    traceparent: Annotated[str | None, Header()] = None,
) -> Response:
    """Submit up to 1,000 jobs in one transaction: all of them, or none. Errors name `jobs[3].resources.replicas`. Of an
    array the answer has the first job; with those of arrays they are at most 10,000."""
    accepted = await services.submitter.submit(
        Submission(
            specs=specs,
            actor=principal.actor,
            received_at=request.scope["phalanx.received_at"],
            batch=True,
            idempotency=await idempotency_of(request, principal, idempotency_key, operation="submit_jobs"),
            traceparent=_sane(traceparent),
            render=_render_all if idempotency_key else None,
        )
    )
    return _accepted(accepted, None if accepted.response is not None else _page(accepted.jobs))


def _render_one(jobs: Sequence[NewJob]) -> Any:
    return accepted_document(jobs[0]).model_dump(mode="json")


def _render_all(jobs: Sequence[NewJob]) -> Any:
    return _page(jobs).model_dump(mode="json")


def _page(jobs: Sequence[NewJob]) -> Page[AcceptedJob]:
    return Page(items=[accepted_document(job) for job in jobs])


def _accepted(accepted: Accepted, document: Any) -> Response:
    response = _json(document if document is not None else accepted.response, status=201)
    if accepted.replayed:
        response.headers[REPLAYED] = "true"
    return response


def _json(document: Any, *, status: int) -> Response:
    """Serialised once, without a second validation by the framework."""
    return Response(pydantic_core.to_json(document), status, media_type="application/json")


def _sane(traceparent: str | None) -> str | None:
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


# ------------------------------------------------------------------ look


@router.get("/v1/jobs", operation_id="list_jobs")
async def list_all_jobs(
    services: Serving,
    principal: Looking,
    tenant: Annotated[str | None, Query(description="This tenant and those below it.")] = None,
    state: Annotated[list[JobState] | None, Query(description="Repeatable.")] = None,
    name: Annotated[str | None, Query(max_length=128)] = None,
    label: Annotated[list[str] | None, Query(max_length=LABELS_MAX, description="`key=value`; repeatable.")] = None,
    submitted_after: AwareDatetime | None = None,
    array: Annotated[str | None, Query(max_length=64, description="Only the jobs of this array.")] = None,
    limit: Limit = 50,
    cursor: CursorText = None,
) -> Page[Job]:
    """Jobs, newest first."""
    wanted = JobFilter(
        tenant=narrowed(principal, tenant),
        states=[each.value for each in state or ()],
        name=name,
        labels=dict(_label(each) for each in label or ()),
        submitted_after=submitted_after,
        array=parse_id("array", array) if array else None,
    )
    before = _id_of_cursor(cursor) if cursor else None
    async with services.reads.connect() as conn:
        rows = await list_jobs(conn, wanted, before=before, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].id.hex) if len(rows) > limit else None
    return Page(items=[job_document(row) for row in page], next_cursor=more)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Invalid.field("label", f"{text[:80]!r} is not key=value")
    return key, value


def _id_of_cursor(cursor: str) -> UUID:
    (digits,) = decode_cursor(cursor, (str,))
    try:
        return UUID(hex=digits)
    except ValueError as error:
        raise Invalid.field("cursor", "is not a cursor of this list") from error


@router.get("/v1/jobs/{job_id}", operation_id="get_job")
async def get_job(job_id: str, services: Serving, principal: Looking) -> Job:
    """One job, with its latest attempt, and its place in the queue while it waits."""
    return await read_job(services, await visible_job(services, principal, job_id))


async def read_job(services: Services, job_id: UUID) -> Job:
    async with services.reads.connect() as conn:
        row = await load_job(conn, job_id)
        if row is None:
            raise not_found(f"job {ids.encode('job', job_id)}")
        position = await position_in_queue(conn, job_id) if row.state == JobState.QUEUED else None
    return job_document(row, position=position)


@router.get("/v1/jobs/{job_id}/attempts", operation_id="list_job_attempts")
async def list_job_attempts(job_id: str, services: Serving, principal: Looking) -> Page[Attempt]:
    """Every try at running a job, first to last."""
    id = await visible_job(services, principal, job_id)
    async with services.reads.connect() as conn:
        rows = await load_attempts(conn, id)
    made = [attempt_document(r.attempt, received_at=r.received_at, submitted_at=r.submitted_at) for r in rows]
    return Page(items=[each for each in made if each is not None])


# ------------------------------------------------------------------ steer


@router.post("/v1/jobs/{job_id}/cancel", operation_id="cancel_job", status_code=202)
async def cancel(job_id: str, services: Serving, principal: Steering) -> Job:
    """Ask a job to end: SIGTERM, its grace time, SIGKILL. One that waits is cancelled at once. Asking again is fine."""
    return await _steer(services, principal, job_id, cancel_job)


@router.post("/v1/jobs/{job_id}/hold", operation_id="hold_job")
async def hold(job_id: str, services: Serving, principal: Steering) -> Job:
    """Keep a job from starting until it is released; one that runs goes on."""
    return await _steer(services, principal, job_id, hold_job)


@router.post("/v1/jobs/{job_id}/release", operation_id="release_job")
async def release(job_id: str, services: Serving, principal: Steering) -> Job:
    """Let a held job start."""
    return await _steer(services, principal, job_id, release_job)


@router.post("/v1/jobs/{job_id}/requeue", operation_id="requeue_job", status_code=202)
async def requeue(job_id: str, services: Serving, principal: Steering) -> Job:
    """End the attempt of a job that runs, with its grace time, and put the job back into the queue. No retry is used
    up."""
    return await _steer(services, principal, job_id, requeue_job)


class JobChange(Given):
    """What can be changed of a job that has not ended."""

    priority: Annotated[str | int, Field(description="A priority class, or a number from -1000 to 1000.")]

    @field_validator("priority", mode="before")
    @classmethod
    def _is_priority(cls, given: object) -> object:
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise ValueError(f"expected a priority class or a whole number, got {given!r:.60}")
        priority_of(given)
        return given


@router.patch("/v1/jobs/{job_id}", operation_id="change_job", openapi_extra=takes(JobChange))
async def change(
    job_id: str,
    services: Serving,
    principal: Steering,
    given: Annotated[JobChange, Depends(body_as(JobChange))],
) -> Job:
    """Change the priority of a job that waits or runs. Its spec stays as it was submitted."""
    id = await visible_job(services, principal, job_id)
    await set_priority(services.engine, id, given.priority, actor=principal.actor, now=now())
    return await read_job(services, id)


async def _steer(services: Services, principal: Principal, job_id: str, action: Any) -> Job:
    id = await visible_job(services, principal, job_id)
    await action(services.engine, id, actor=principal.actor, now=now())
    return await read_job(services, id)
