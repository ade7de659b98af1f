"""What happened to a job, as a list or live."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Looking, Services, Serving, topic, visible_job
from phalanx_server.api.job_documents import Event, event_document
from phalanx_server.api.pages import Limit, Page
from phalanx_server.api.sse import STREAM_RESPONSES, Batch, event, resume_after, stream, wants_stream
from phalanx_server.store.event_views import list_events
from phalanx_server.store.job_views import job_end

router = APIRouter(tags=["jobs"])

BATCH_EVENTS = 200

After = Annotated[int | None, Query(ge=0, lt=1 << 62, description="Only events with a larger id.")]
LastEventId = Annotated[str | None, Header(alias="Last-Event-ID", max_length=64)]


@router.get(
    "/v1/jobs/{job_id}/events",
    operation_id="list_job_events",
    response_model=Page[Event],
    responses=STREAM_RESPONSES,
)
async def list_job_events(
    job_id: str,
    services: Serving,
    principal: Looking,
    after: After = None,
    limit: Limit = 50,
    follow: bool = False,
    accept: Annotated[str | None, Header()] = None,
    last_event_id: LastEventId = None,
) -> Page[Event] | Response:
    """Events, oldest first. With `follow=true` (or `Accept: text/event-stream`) they keep coming as server-sent events,
    each with its id, until the job is over; then comes the event `end`."""
    id = await visible_job(services, principal, job_id)
    if wants_stream(accept, follow):
        start = resume_after(last_event_id, otherwise=after) or 0
        return _follow(services, principal, id, start)
    async with services.reads.connect() as conn:
        rows = await list_events(conn, id, after=after or 0, limit=limit + 1)
    items = [event_document(row) for row in rows[:limit]]
    return Page(items=items, next_cursor=str(items[-1].id) if len(rows) > limit else None)


def _follow(services: Services, principal: Principal, job_id: UUID, start: int) -> Response:
    async def fetch(after: int) -> Batch:
        async with services.reads.connect() as conn:
            end = await job_end(conn, job_id)  # first: every event of an end seen here is seen below
            rows = await list_events(conn, job_id, after=after, limit=BATCH_EVENTS)
        settled = [row for row in rows if row.settled]
        events = [event("event", event_document(row), id=row.id) for row in settled]
        over = not rows and end.finished_at is not None
        return Batch(events, settled[-1].id if settled else after, over, {"state": end.state}, soon=bool(rows))

    return stream(services, principal, fetch, topics=[topic("job", job_id)], cursor=start)
