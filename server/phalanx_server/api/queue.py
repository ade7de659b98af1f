"""The queue: waiting jobs in the order in which a pass considers them, each with why it waits."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Row

from phalanx_server.api.deps import Looking, Serving, narrowed
from phalanx_server.api.job_documents import ArrayPlace, Hold, array_place, hold_document
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.errors import Invalid
from phalanx_server.store import ids
from phalanx_server.store.queue_views import QueuePlace, list_queue

router = APIRouter(tags=["queue"])


class QueueItem(BaseModel):
    position: int
    job_id: str
    name: str
    tenant: str
    priority: int
    replicas: int
    gpus_per_replica: int
    submitted_at: datetime
    hold: Hold | None
    array: ArrayPlace | None


@router.get("/v1/queue", operation_id="list_queue")
async def list_waiting(
    services: Serving, principal: Looking, tenant: str | None = None, limit: Limit = 50, cursor: CursorText = None
) -> Page[QueueItem]:
    """Waiting jobs, next to be considered first. Positions count the whole queue, also where only a part is shown."""
    after = _place(cursor) if cursor else None
    async with services.reads.connect() as conn:
        rows = await list_queue(conn, tenant=narrowed(principal, tenant), after=after, limit=limit + 1)
    page = rows[:limit]
    return Page(items=[_item(row) for row in page], next_cursor=_cursor(page[-1]) if len(rows) > limit else None)


def _item(row: Row[Any]) -> QueueItem:
    return QueueItem(
        position=row.position,
        job_id=ids.encode("job", row.id),
        name=row.name,
        tenant=row.tenant,
        priority=row.priority,
        replicas=row.replicas or 1,
        gpus_per_replica=row.gpus_per_replica or 0,
        submitted_at=row.submitted_at,
        hold=hold_document(row),
        array=array_place(row, row.array),
    )


def _cursor(row: Row[Any]) -> str:
    return encode_cursor(row.priority, row.submitted_at.isoformat(), row.id.hex, row.position)


def _place(cursor: str) -> QueuePlace:
    priority, submitted_at, id, position = decode_cursor(cursor, (int, str, str, int))
    try:
        return QueuePlace(priority, datetime.fromisoformat(submitted_at), UUID(id), position)
    except ValueError as error:
        raise Invalid.field("cursor", "is not a cursor of this list") from error
