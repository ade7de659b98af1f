"""Profiles of running jobs: asked for, followed, and their traces fetched.

Owns the routes for users. How traces come in is `node_link`'s.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.idempotency import once
from phalanx_server.actions.request_profile import Wanted, rank_states, request_profile
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Looking, Serving, Steering, now, parse_id, visible_job
from phalanx_server.api.errors import not_found
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import Page
from phalanx_server.api.stalls import Sent
from phalanx_server.domain.output import GROUP_RANK_MAX
from phalanx_server.domain.profile import RANKS_MAX, STEPS, STEPS_MAX, ProfileState, state_of
from phalanx_server.store import ids
from phalanx_server.store.profiles import find_trace, list_profiles, load_profile

router = APIRouter(tags=["profiles"])

_GZIP = {"application/gzip": {"schema": {"type": "string", "format": "binary"}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": _GZIP,
        "headers": {"ETag": {"schema": {"type": "string"}, "description": "The SHA-256 of the bytes, in quotes."}},
    }
}


class NewProfile(Given):
    """`ranks` absent: the first rank of each node, of eight nodes at most."""

    steps: Annotated[int, Field(ge=1, le=STEPS_MAX, description="Optimizer steps that are recorded.")] = STEPS
    ranks: Annotated[list[int], Field(min_length=1, max_length=RANKS_MAX)] | None = None


class RankProfile(BaseModel):
    """One rank of a profile; `bytes` and `sha256` are of its trace, once that is there."""

    rank: int
    state: ProfileState
    reason: str
    bytes: int | None
    sha256: str | None


class Profile(BaseModel):
    """`ready`: nothing more comes, and there is at least one trace. `reason` is the first why there is one less."""

    id: str
    job_id: str
    attempt: int
    steps: int
    state: ProfileState
    reason: str
    ranks: list[RankProfile]
    created_by: str
    created_at: datetime


@router.post(
    "/v1/jobs/{job_id}/profiles", operation_id="request_profile", status_code=202, openapi_extra=takes(NewProfile)
)
async def request(
    job_id: str,
    request: Request,
    response: Response,
    services: Serving,
    principal: Steering,
    given: Annotated[NewProfile, Depends(body_as(NewProfile))],
    idempotency_key: IdempotencyKey = None,
) -> Profile:
    """Ask the ranks of a running job for a trace of their next optimizer steps. It goes on meanwhile."""
    id = await visible_job(services, principal, job_id)
    asked_at = now()

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        made = await request_profile(conn, id, Wanted(given.steps, given.ranks), actor=principal.actor, now=asked_at)
        return _document(await load_profile(conn, id, made), asked_at).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation=f"request_profile:{id.hex}")
    done = await once(services.engine, key, work)
    mark_replayed(response, done.replayed)
    return Profile.model_validate(done.response)


@router.get("/v1/jobs/{job_id}/profiles", operation_id="list_job_profiles")
async def list_job_profiles(job_id: str, services: Serving, principal: Looking) -> Page[Profile]:
    """Every profile of the job, newest first."""
    id = await visible_job(services, principal, job_id)
    async with services.reads.connect() as conn:
        rows = await list_profiles(conn, id)
    return Page(items=[_document(row, now()) for row in rows])


@router.get("/v1/jobs/{job_id}/profiles/{profile_id}", operation_id="get_job_profile")
async def get_job_profile(job_id: str, profile_id: str, services: Serving, principal: Looking) -> Profile:
    """One profile: how far each of its ranks is."""
    id, profile = await visible_job(services, principal, job_id), parse_id("profile", profile_id)
    async with services.reads.connect() as conn:
        row = await load_profile(conn, id, profile)
    if row is None:
        raise not_found(f"profile {profile_id} of this job")
    return _document(row, now())


@router.get(
    "/v1/jobs/{job_id}/profiles/{profile_id}/ranks/{rank}",
    operation_id="read_job_trace",
    response_class=StreamingResponse,
    responses=_FILE,
)
async def read_job_trace(
    job_id: str,
    profile_id: str,
    rank: Annotated[int, Path(ge=0, le=GROUP_RANK_MAX)],
    services: Serving,
    principal: Looking,
) -> StreamingResponse:
    """The trace of one rank: Chrome's format, JSON compressed by gzip, which ui.perfetto.dev opens as it is."""
    id, profile = await visible_job(services, principal, job_id), parse_id("profile", profile_id)
    async with services.reads.connect() as conn:
        row = await find_trace(conn, id, profile, rank)
    if row is None:
        raise not_found(f"trace of rank {rank} in {profile_id}")
    if await services.output_files.size_bytes(row.url) != row.bytes:
        raise not_found(f"trace of rank {rank} in {profile_id} in the storage")
    return Sent(
        services.output_files.read(row.url), media_type="application/gzip", headers=_headers(row, profile, rank)
    )


def _headers(row: Row[Any], profile: UUID, rank: int) -> dict[str, str]:
    return {
        "Content-Length": str(row.bytes),
        "ETag": f'"{row.hash}"',
        "Content-Disposition": f"attachment; filename={ids.encode('profile', profile)}-rank-{rank}.json.gz",
        "X-Content-Type-Options": "nosniff",
    }


def _document(row: Row[Any] | None, at: datetime) -> Profile:
    assert row is not None
    states = rank_states(row, now=at)
    whole = state_of(states)
    return Profile(
        id=ids.encode("profile", row.id),
        job_id=ids.encode("job", row.job_id),
        attempt=row.attempt,
        steps=row.steps,
        state=whole.state,
        reason=whole.reason,
        ranks=[
            RankProfile(**{**heard, "state": told.state, "reason": told.reason})
            for heard, told in zip(row.ranks, states, strict=True)
        ],
        created_by=row.created_by,
        created_at=row.created_at,
    )
