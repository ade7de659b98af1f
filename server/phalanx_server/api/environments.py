"""Registered environments: packages under a name, for the jobs of a tenant and of all below it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions import create_environment as creation
from phalanx_server.actions.delete_environment import delete_environment
from phalanx_server.actions.idempotency import once
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Looking, Managing, Serving, narrowed, parse_id
from phalanx_server.api.errors import not_found
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.access import in_line
from phalanx_server.domain.field_types import Name
from phalanx_server.store import ids
from phalanx_server.store.environments import list_environments, load_environment

router = APIRouter(tags=["environments"])

LINES_MAX = 10_000


class NewEnvironment(Given):
    """`requirements` are lines as pip's requirements files have them; `tenant` absent: the caller's own, else
    `default`."""

    name: Name
    tenant: Annotated[str, Field(max_length=256)] | None = None
    requirements: Annotated[list[str], Field(min_length=1, max_length=LINES_MAX)]


class RegisteredEnvironment(BaseModel):
    """It never changes. Jobs of `tenant` and of all below it use it as `run.environment: {name: …}`."""

    id: str
    name: str
    tenant: str
    requirements: list[str]
    created_by: str
    created_at: datetime


@router.get("/v1/environments", operation_id="list_environments")
async def list_all_environments(
    services: Serving,
    principal: Looking,
    tenant: Annotated[str | None, Query(description="What this tenant sees, instead of the caller's own.")] = None,
    name: Annotated[str | None, Query(max_length=128)] = None,
    limit: Limit = 50,
    cursor: CursorText = None,
) -> Page[RegisteredEnvironment]:
    """Environments by name: of the caller's tenant, of those below it, and of those above it, which it inherits."""
    wanted = narrowed(principal, tenant)
    after = _key_of_cursor(cursor) if cursor else None
    async with services.reads.connect() as conn:
        rows = await list_environments(conn, tenant=wanted, name=name, after=after, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].name, page[-1].tenant) if len(rows) > limit else None
    return Page(items=[_document(row) for row in page], next_cursor=more)


def _key_of_cursor(cursor: str) -> tuple[str, str]:
    name, tenant = decode_cursor(cursor, (str, str))
    return name, tenant


@router.post(
    "/v1/environments", operation_id="create_environment", status_code=201, openapi_extra=takes(NewEnvironment)
)
async def create_environment(
    request: Request,
    response: Response,
    services: Serving,
    principal: Managing,
    given: Annotated[NewEnvironment, Depends(body_as(NewEnvironment))],
    idempotency_key: IdempotencyKey = None,
) -> RegisteredEnvironment:
    """Register requirements under a name. They never change: other packages need another name."""

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        wanted = creation.NewEnvironment(given.name, given.requirements, given.tenant)
        made = await creation.create_environment(conn, wanted, actor=principal.actor)
        return _document(await load_environment(conn, made)).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation="create_environment")
    done = await once(services.engine, key, work)
    mark_replayed(response, done.replayed)
    return RegisteredEnvironment.model_validate(done.response)


@router.get("/v1/environments/{environment_id}", operation_id="get_environment")
async def get_environment(environment_id: str, services: Serving, principal: Looking) -> RegisteredEnvironment:
    """One environment with its requirements."""
    id = parse_id("environment", environment_id)
    async with services.reads.connect() as conn:
        row = await load_environment(conn, id)
    if row is None or not in_line(principal.tenant, row.tenant):
        raise not_found(f"environment {environment_id}")
    return _document(row)


@router.delete("/v1/environments/{environment_id}", operation_id="delete_environment", status_code=204)
async def delete(environment_id: str, services: Serving, principal: Managing) -> None:
    """Delete an environment. Jobs that used it keep their copy of its requirements."""
    id: UUID = parse_id("environment", environment_id)
    await delete_environment(services.engine, id, actor=principal.actor)


def _document(row: Row[Any] | None) -> RegisteredEnvironment:
    assert row is not None
    shown = {name: row._mapping[name] for name in RegisteredEnvironment.model_fields if name != "id"}
    return RegisteredEnvironment(**shown, id=ids.encode("environment", row.id))
