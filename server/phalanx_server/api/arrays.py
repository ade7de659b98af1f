"""Arrays: the jobs of one submit that carry an index, looked at and steered together.

Owns the routes. Each job of an array is a job like any other: `GET /v1/jobs?array=…` lists them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from sqlalchemy import Row

from phalanx_server.actions.cancel_job import cancel_array
from phalanx_server.actions.hold_job import hold_array, release_array
from phalanx_server.actions.requeue_job import requeue_array
from phalanx_server.actions.set_priority import set_array_priority
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import body_as, takes
from phalanx_server.api.deps import Looking, Services, Serving, Steering, now, visible_array
from phalanx_server.api.errors import not_found
from phalanx_server.api.jobs import JobChange
from phalanx_server.domain.array import size_of
from phalanx_server.domain.job import JobState
from phalanx_server.store import ids
from phalanx_server.store.array_views import load_array

router = APIRouter(tags=["arrays"])


class ArrayStatus(BaseModel):
    """An array as a whole."""

    id: str
    name: str
    tenant: str
    size: int = Field(description="Jobs of the array.")
    indices: str
    max_running: int | None
    states: dict[str, int] = Field(description="How many of its jobs are in which state.")
    held: int = Field(description="Of those that wait, how many are on hold.")
    ended: bool = Field(description="Whether all of them have ended.")
    created_by: str
    submitted_at: datetime


@router.get("/v1/arrays/{array_id}", operation_id="get_array")
async def get_array(array_id: str, services: Serving, principal: Looking) -> ArrayStatus:
    """An array, and how far its jobs are."""
    return await _read(services, await visible_array(services, principal, array_id))


@router.post("/v1/arrays/{array_id}/cancel", operation_id="cancel_array", status_code=202)
async def cancel(array_id: str, services: Serving, principal: Steering) -> ArrayStatus:
    """Ask all jobs of an array that have not ended to end. Asking again is fine."""
    return await _steer(services, principal, array_id, cancel_array)


@router.post("/v1/arrays/{array_id}/hold", operation_id="hold_array")
async def hold(array_id: str, services: Serving, principal: Steering) -> ArrayStatus:
    """Keep the jobs of an array from starting until they are released; those that run go on."""
    return await _steer(services, principal, array_id, hold_array)


@router.post("/v1/arrays/{array_id}/release", operation_id="release_array")
async def release(array_id: str, services: Serving, principal: Steering) -> ArrayStatus:
    """Let the held jobs of an array start."""
    return await _steer(services, principal, array_id, release_array)


@router.post("/v1/arrays/{array_id}/requeue", operation_id="requeue_array", status_code=202)
async def requeue(array_id: str, services: Serving, principal: Steering) -> ArrayStatus:
    """Put the jobs of an array that run back into the queue. No retry is used up."""
    return await _steer(services, principal, array_id, requeue_array)


@router.patch("/v1/arrays/{array_id}", operation_id="change_array", openapi_extra=takes(JobChange))
async def change(
    array_id: str,
    services: Serving,
    principal: Steering,
    given: Annotated[JobChange, Depends(body_as(JobChange))],
) -> ArrayStatus:
    """Change the priority of all jobs of an array that have not ended."""
    id = await visible_array(services, principal, array_id)
    await set_array_priority(services.engine, id, given.priority, actor=principal.actor, now=now())
    return await _read(services, id)


async def _steer(services: Services, principal: Principal, array_id: str, action: Any) -> ArrayStatus:
    id = await visible_array(services, principal, array_id)
    await action(services.engine, id, actor=principal.actor, now=now())
    return await _read(services, id)


async def _read(services: Services, array_id: UUID) -> ArrayStatus:
    async with services.reads.connect() as conn:
        row = await load_array(conn, array_id)
    if row is None:
        raise not_found(ids.encode("array", array_id))
    return _document(row)


_OVER = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


def _document(row: Row[Any]) -> ArrayStatus:
    asked = row.spec["array"]
    return ArrayStatus(
        id=ids.encode("array", row.id),
        name=row.name,
        tenant=row.tenant,
        size=size_of(asked["indices"]),
        indices=asked["indices"],
        max_running=asked["max_running"],
        states=row.states,
        held=row.held,
        ended=_OVER.issuperset(map(JobState, row.states)),
        created_by=row.created_by,
        submitted_at=row.submitted_at,
    )
