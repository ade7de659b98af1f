"""Maintenance windows: when which nodes are to be empty."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions import declare_maintenance as maintenance
from phalanx_server.actions.idempotency import once
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Looking, Operating, Services, Serving, now, parse_id
from phalanx_server.api.errors import not_found
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.field_types import Labels, Moment
from phalanx_server.domain.maintenance import WindowState, state_at
from phalanx_server.store import ids
from phalanx_server.store.maintenance import list_windows, load_window

router = APIRouter(tags=["maintenance"])

NODES_MAX = 1_000
REASON_MAX_CHARS = 500

Nodes = Annotated[
    list[Annotated[str, Field(max_length=256)]],
    Field(max_length=NODES_MAX, description="Names, or ids where clusters share a name."),
]
LABELS_SAY = "Covers the nodes that have all of these, also those that join later."
Reason = Annotated[str, Field(max_length=REASON_MAX_CHARS, description="For people; every user may read it.")]


class NewWindow(Given):
    """It covers the nodes that are named, and those that have all of the labels. A start that has passed: it is open at
    once."""

    nodes: Nodes = Field(default_factory=list)
    labels: Annotated[Labels, Field(description=LABELS_SAY)] = Field(default_factory=dict)
    starts_at: Moment
    ends_at: Annotated[Moment, Field(description="After `starts_at`, and still to come.")]
    reason: Reason = ""


class WindowChange(Given):
    """Only what is named changes. `nodes: []` and `labels: {}` take away what it had of them: one of the two has to be
    left."""

    nodes: Nodes | None = None
    labels: Annotated[Labels, Field(description=LABELS_SAY)] | None = None
    starts_at: Moment | None = None
    ends_at: Moment | None = None
    reason: Reason | None = None


class MaintenanceWindow(BaseModel):
    """No job starts that is not sure to end before it; what still runs there when it begins is stopped, with the reason
    `maintenance`, and waits."""

    id: str
    state: WindowState = Field(description="`planned`, `open` from its start, `over` from its end on.")
    starts_at: datetime
    ends_at: datetime
    reason: str
    nodes: list[str] = Field(description="Those that it names.")
    labels: dict[str, str]
    covers: int = Field(description="How many nodes it covers now, by name and by labels together.")
    created_by: str | None = Field(description="For operators.")
    created_at: datetime
    version: int


@router.get("/v1/maintenance", operation_id="list_maintenance")
async def list_maintenance(
    services: Serving,
    principal: Looking,
    over: Annotated[bool, Query(description="Those that are over, too.")] = False,
    limit: Limit = 50,
    cursor: CursorText = None,
) -> Page[MaintenanceWindow]:
    """Maintenance windows by their start."""
    after, at = _key_of_cursor(cursor) if cursor else None, now()
    async with services.reads.connect() as conn:
        rows = await list_windows(conn, ends_after=None if over else at, after=after, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].starts_at.isoformat(), page[-1].id.hex) if len(rows) > limit else None
    return Page(items=[_document(row, principal) for row in page], next_cursor=more)


def _key_of_cursor(cursor: str) -> tuple[datetime, UUID]:
    start, id_ = decode_cursor(cursor, (str, str))
    try:
        return datetime.fromisoformat(start), UUID(hex=id_)
    except ValueError as error:
        raise Invalid.field("cursor", "is not a cursor of this list", "pass next_cursor of the page before") from error


@router.post("/v1/maintenance", operation_id="create_maintenance", status_code=201, openapi_extra=takes(NewWindow))
async def create_maintenance(
    request: Request,
    response: Response,
    services: Serving,
    principal: Operating,
    given: Annotated[NewWindow, Depends(body_as(NewWindow))],
    idempotency_key: IdempotencyKey = None,
) -> MaintenanceWindow:
    """Declare a window. The next pass follows it."""

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        wanted = maintenance.WantedWindow(**dict(given))
        made = await maintenance.declare_maintenance(conn, wanted, actor=principal.actor, now=now())
        return _document(await load_window(conn, made), principal).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation="create_maintenance")
    done = await once(services.engine, key, work)
    mark_replayed(response, done.replayed)
    return MaintenanceWindow.model_validate(done.response)


@router.get("/v1/maintenance/{window_id}", operation_id="get_maintenance")
async def get_maintenance(window_id: str, services: Serving, principal: Looking) -> MaintenanceWindow:
    """One window."""
    return await _read(services, principal, parse_id("maintenance", window_id))


@router.patch("/v1/maintenance/{window_id}", operation_id="change_maintenance", openapi_extra=takes(WindowChange))
async def change_maintenance(
    window_id: str,
    services: Serving,
    principal: Operating,
    given: Annotated[WindowChange, Depends(body_as(WindowChange))],
) -> MaintenanceWindow:
    """Change a window that is not over: 409 else."""
    id = parse_id("maintenance", window_id)
    changes = {name: value for name, value in dict(given).items() if value is not None}
    await maintenance.change_maintenance(services.engine, id, changes, actor=principal.actor, now=now())
    return await _read(services, principal, id)


@router.post("/v1/maintenance/{window_id}/end", operation_id="end_maintenance")
async def end_maintenance(window_id: str, services: Serving, principal: Operating) -> MaintenanceWindow:
    """End an open window now: its nodes take work again. 409 for one that has not begun (delete it) or is over."""
    id = parse_id("maintenance", window_id)
    await maintenance.end_maintenance(services.engine, id, actor=principal.actor, now=now())
    return await _read(services, principal, id)


@router.delete("/v1/maintenance/{window_id}", operation_id="delete_maintenance", status_code=204)
async def delete_maintenance(window_id: str, services: Serving, principal: Operating) -> None:
    """Delete a window, also one that is open: its nodes take work again."""
    id = parse_id("maintenance", window_id)
    await maintenance.delete_maintenance(services.engine, id, actor=principal.actor)


async def _read(services: Services, principal: Principal, window_id: UUID) -> MaintenanceWindow:
    async with services.reads.connect() as conn:
        row = await load_window(conn, window_id)
    if row is None:
        raise not_found(f"maintenance window {ids.encode('maintenance', window_id)}")
    return _document(row, principal)


_SHOWN = MaintenanceWindow.model_fields.keys() - {"id", "state", "created_by"}


def _document(row: Row[Any] | None, principal: Principal) -> MaintenanceWindow:
    assert row is not None
    return MaintenanceWindow(
        **{name: row._mapping[name] for name in _SHOWN},
        id=ids.encode("maintenance", row.id),
        state=state_at(now(), starts_at=row.starts_at, ends_at=row.ends_at),
        created_by=row.created_by if principal.may("operate") else None,
    )
