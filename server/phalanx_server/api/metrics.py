"""Metrics of a job: series for charts, or the latest progress live."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import AwareDatetime, BaseModel, Field
from sqlalchemy import Row
from sse_starlette import ServerSentEvent

from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Looking, Services, Serving, now, topic, visible_job
from phalanx_server.api.events import LastEventId
from phalanx_server.api.job_documents import Progress
from phalanx_server.api.sse import STREAM_RESPONSES, Batch, event, resume_after, stream
from phalanx_server.domain.errors import Invalid
from phalanx_server.store.job_views import job_end
from phalanx_server.store.metric_views import Window, list_extents, load_progress, load_series

router = APIRouter(tags=["metrics"])

MAX_NAMES = 100
POINTS_PER_ANSWER = 40_000
"""Over all names: where many are asked for, each gets fewer points."""
DRAIN_S = 1.0

Names = Annotated[list[str] | None, Query(max_length=MAX_NAMES, description="Repeatable; absent: all names.")]
MaxPoints = Annotated[int, Query(ge=2, le=2000)]


class MetricBucket(BaseModel):
    """A bucket of a series: the values of all ranks in it."""

    at: datetime
    step: int | None
    min: float
    max: float
    mean: float
    count: int


class MetricSeries(BaseModel):
    name: str
    resolution_s: int = Field(description="Width of a bucket; 0 = one point per reported step.")
    points: list[MetricBucket]


class Metrics(BaseModel):
    series: list[MetricSeries]


@router.get(
    "/v1/jobs/{job_id}/metrics", operation_id="read_job_metrics", response_model=Metrics, responses=STREAM_RESPONSES
)
async def read_job_metrics(
    job_id: str,
    services: Serving,
    principal: Looking,
    name: Names = None,
    start: Annotated[AwareDatetime | None, Query(alias="from")] = None,
    end: Annotated[AwareDatetime | None, Query(alias="to")] = None,
    max_points: MaxPoints = 500,
    follow: bool = False,
    last_event_id: LastEventId = None,
) -> Metrics | Response:
    """Series, downsampled. With `follow=true`: server-sent events `metrics` with the latest progress, until the job is
    over; then comes `end`."""
    id = await visible_job(services, principal, job_id)
    if follow:
        return _follow(services, principal, id, names=name, after=resume_after(last_event_id, otherwise=None))
    if start is not None and end is not None and end <= start:
        raise Invalid.field("to", "must be after `from`")
    return await _read(services, id, names=name, window=Window(start, end), max_points=max_points)


async def _read(
    services: Services, job_id: UUID, *, names: list[str] | None, window: Window, max_points: int
) -> Metrics:
    async with services.reads.connect() as conn:
        extents = await list_extents(conn, job_id, names=names, window=window)
        points = max(2, min(max_points, POINTS_PER_ANSWER // max(1, len(extents))))
        found = [await load_series(conn, job_id, extent, window=window, max_points=points) for extent in extents]
    return Metrics(
        series=[
            MetricSeries(name=s.name, resolution_s=s.resolution_s, points=[_point(row) for row in s.points])
            for s in found
        ]
    )


def _point(row: Row[Any]) -> MetricBucket:
    return MetricBucket(**row._mapping)


# ------------------------------------------------------------------ live


def _follow(
    services: Services, principal: Principal, job_id: UUID, *, names: list[str] | None, after: int | None
) -> Response:
    async def fetch(cursor: int | None) -> Batch:
        async with services.reads.connect() as conn:
            end = await job_end(conn, job_id)
            row = await load_progress(conn, job_id)
        version = _microseconds(row.at) if row else None
        if row is not None and version is not None and version != cursor:
            return Batch([_event(row, version, names)], version)
        over = end.finished_at is not None and (now() - end.finished_at).total_seconds() > DRAIN_S
        return Batch([], cursor, over, {"state": end.state}, soon=end.finished_at is not None)

    return stream(services, principal, fetch, topics=[topic("metrics", job_id), topic("job", job_id)], cursor=after)


def _event(row: Row[Any], version: int, names: list[str] | None) -> ServerSentEvent:
    values = row._mapping["values"]
    shown = values if names is None else {name: value for name, value in values.items() if name in names}
    document = Progress(step=row.step, total_steps=row.total_steps, values=shown, at=row.at)
    return event("metrics", document, id=version)


def _microseconds(at: datetime) -> int:
    """The time as a whole number: the id of a progress event."""
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
