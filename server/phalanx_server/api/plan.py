"""`POST /v1/plan`: what would the scheduler do if …"""

from __future__ import annotations

import re
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
from phalanx_server.api.nodes import find_node
from phalanx_server.api.tenants import GivenQuota
from phalanx_server.api.what_if import Edits, Outcome, hypothetical, plan_document, work_of_spec
from phalanx_server.domain.errors import Invalid, PhalanxError
from phalanx_server.domain.spec import JobSpec, parse_job
from phalanx_server.scheduling.predict import Work
from phalanx_server.scheduling.snapshot import Job, NodeState, Quota, parse_snapshot
from phalanx_server.store import ids
from phalanx_server.store.job_views import names_of_jobs
from phalanx_server.store.node_views import names_of_nodes

router = APIRouter(tags=["plan"])

JOBS_MAX = 1000
NAMES_MAX = 10_000


class PlanQuestion(Given):
    """What would be different; with nothing, the plan for things as they are.

    `jobs`: job files, as if submitted now. `quotas`: what tenants would have, by path and resource; a resource that is
    not named stays as it is. `nodes`: the states that nodes would have, by name or id. Instead of these: `changes`, as
    plan-format says changes, to the live snapshot, which names jobs and nodes by id; or `snapshot`, a whole snapshot
    instead of live state. All but `jobs` is for operators.
    """

    jobs: Annotated[list[dict[str, Any]], Field(max_length=JOBS_MAX)] | None = None
    quotas: dict[str, dict[str, GivenQuota]] | None = None
    nodes: dict[str, NodeState] | None = None
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
    names: dict[str, str] = Field(description="Names of the jobs and nodes of the plan, by id.")
    jobs: list[str] = Field(description="The ids that the plan uses for the job files of the question, in their order.")
    snapshot_at: datetime


@router.post("/v1/plan", operation_id="make_plan", openapi_extra=takes(PlanQuestion))
async def make_plan(
    services: Serving,
    principal: Looking,
    question: Annotated[PlanQuestion, Depends(body_as(PlanQuestion))],
) -> PlanAnswer:
    """The plan that the next pass would make. Nothing is stored."""
    given = [name for name in PlanQuestion.model_fields if getattr(question, name) is not None]
    if len(given) > 1 and (alone := [name for name in given if name in ("changes", "snapshot")]):
        other = next(name for name in given if name != alone[-1])
        raise Invalid.field(alone[-1], f"cannot be combined with {other}")
    for name in given:
        if name != "jobs" and not principal.may("operate"):
            raise Problem("forbidden", f"{name} is for operators: with jobs you can ask about jobs of your own.")
    outcome, new = await _outcome(services, principal, question)
    document = plan_document(outcome, principal.sees)
    names = await _names(services, document)
    for id_, job in zip(new, question.jobs or (), strict=True):
        names[id_] = str(job.get("name") or id_)
    return PlanAnswer(plan=PlanDocument(**document), jobs=new, names=names, snapshot_at=outcome.snapshot_at)


async def _names(services: Services, document: dict[str, Any]) -> dict[str, str]:
    """Names by id of the jobs and nodes that a plan decides about, of a bounded number."""
    rows = [row for kind in document.values() for row in kind]
    seats = [row for row in rows if "placement" in row] + [row["kept"] for row in rows if "kept" in row]
    places = {item["node"] for seat in seats for item in seat["placement"]}
    jobs = list(dict.fromkeys(row["job"] for row in rows))[:NAMES_MAX]
    async with services.reads.connect() as conn:
        nodes = await names_of_nodes(conn, [id_.removeprefix("node_") for id_ in places if _ID.fullmatch(id_)])
        named = await names_of_jobs(conn, [id_.removeprefix("job_") for id_ in jobs if _ID.fullmatch(id_)])
    return {f"job_{id_}": name for id_, name in named.items()} | {f"node_{id_}": name for id_, name in nodes.items()}


_ID = re.compile(r"(?:job|node)_[0-9a-f]{32}")


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
    edits = await _edits(services, question)
    try:
        outcome = await services.what_if.with_jobs(list(jobs.values()), works, edits)
    except ValueError as error:
        raise Invalid.field("quotas" if question.quotas else "nodes", str(error)) from error
    return outcome, [f"job_{id_}" for id_ in jobs]


async def _edits(services: Services, question: PlanQuestion) -> Edits:
    quotas = {
        tenant: {resource: Quota(**quota.model_dump()) for resource, quota in given.items()}
        for tenant, given in (question.quotas or {}).items()
    }
    nodes: dict[str, NodeState] = {
        (await find_node(services, node)).hex: state for node, state in (question.nodes or {}).items()
    }
    return Edits(quotas, nodes)


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
