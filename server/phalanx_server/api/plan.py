"""`POST /v1/plan`: what would the scheduler do if …"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from phalanx_server.actions.awaited_jobs import Unmet
from phalanx_server.actions.check_jobs import Request, check_jobs
from phalanx_server.actions.hardware import HardwareWatch
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Looking, Services, Serving, now
from phalanx_server.api.errors import Problem
from phalanx_server.api.what_if import Outcome, hypothetical, plan_document, work_of_spec
from phalanx_server.domain.errors import Invalid, PhalanxError
from phalanx_server.domain.spec import JobSpec, parse_job
from phalanx_server.scheduling.predict import Work
from phalanx_server.scheduling.snapshot import Job, parse_snapshot
from phalanx_server.store import ids

router = APIRouter(tags=["plan"])

JOBS_MAX = 1000


class PlanQuestion(Given):
    """At most one of the three; with none, the plan for things as they are.

    `jobs`: job files, as if submitted now. `changes`: as plan-format says changes, to the live snapshot, which names
    jobs and nodes by id. `snapshot`: a whole snapshot instead of live state. The last two are for operators.
    """

    jobs: Annotated[list[dict[str, Any]], Field(max_length=JOBS_MAX)] | None = None
    changes: dict[str, Any] | None = None
    snapshot: dict[str, Any] | None = None


class PlanDocument(BaseModel):
    """A plan in plan-format: of jobs that the caller may see."""

    starts: list[dict[str, Any]]
    preemptions: list[dict[str, Any]]
    resizes: list[dict[str, Any]]
    migrations: list[dict[str, Any]]
    holds: list[dict[str, Any]]


class PlanAnswer(BaseModel):
    plan: PlanDocument
    jobs: list[str] = Field(description="The ids that the plan uses for the job files of the question, in their order.")
    snapshot_at: datetime


@router.post("/v1/plan", operation_id="make_plan", openapi_extra=takes(PlanQuestion))
async def make_plan(
    services: Serving,
    principal: Looking,
    question: Annotated[PlanQuestion, Depends(body_as(PlanQuestion))],
) -> PlanAnswer:
    """The plan that the next pass would make. Nothing is stored."""
    given = [name for name in ("jobs", "changes", "snapshot") if getattr(question, name) is not None]
    if len(given) > 1:
        raise Invalid.field(given[1], f"cannot be combined with {given[0]}")
    if given and given[0] != "jobs" and not principal.may("operate"):
        raise Problem("forbidden", f"{given[0]} is for operators: with jobs you can ask about jobs of your own.")
    outcome, new = await _outcome(services, principal, question)
    document = PlanDocument(**plan_document(outcome, principal.sees))
    return PlanAnswer(plan=document, jobs=new, snapshot_at=outcome.snapshot_at)


async def _outcome(services: Services, principal: Principal, question: PlanQuestion) -> tuple[Outcome, list[str]]:
    try:
        if question.snapshot is not None:
            return await services.what_if.of_snapshot(parse_snapshot(question.snapshot)), []
        if question.changes is not None:
            return await services.what_if.with_changes(question.changes), []
    except ValueError as error:
        field = "snapshot" if question.snapshot is not None else "changes"
        raise Invalid.field(field, str(error)) from error
    specs = [parse_job(job, where=f"jobs[{index}]") for index, job in enumerate(question.jobs or ())]
    jobs: dict[str, Job] = {}
    works: dict[str, Work] = {}
    for spec, unmet in await _checked(services, principal, specs):
        id_ = ids.new_id().hex
        jobs[id_] = hypothetical(spec, id=id_, submitted_at=now(), unmet=unmet)
        works[id_] = work_of_spec(spec, user=principal.actor.name)
    outcome = await services.what_if.with_jobs(list(jobs.values()), works)
    return outcome, [f"job_{id_}" for id_ in jobs]


async def _checked(services: Services, principal: Principal, specs: list[JobSpec]) -> list[tuple[JobSpec, Unmet]]:
    """The jobs with their tenants filled in, and what they wait for. Raises what a submit would raise."""
    if not specs:
        return []
    request = Request(specs, principal.actor, batch=True)
    async with services.engine.connect() as conn:
        (checked,) = await check_jobs(conn, [request], HardwareWatch(), policy=services.policy)
    if isinstance(checked, PhalanxError):
        raise checked
    return [(spec.for_tenant(request.tenant_of(spec)), unmet) for spec, unmet in zip(specs, checked.unmet, strict=True)]
