"""Series of a job as charts read them: raw points while they are few, else roll-ups, at most `max_points` per name.

Owns the choice of resolution: a chart of any length reads about `ROWS_PER_SERIES` rows of each name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.metrics import RESOLUTIONS_S

ROWS_PER_SERIES = 2000


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time, `[start, end)`; None = open."""

    start: datetime | None
    end: datetime | None


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is of one name in a window."""

    name: str
    first: datetime
    last: datetime
    values: int


@dataclass(frozen=True, slots=True)
class Series:
    """`resolution_s` 0: raw, one point per step (all ranks together)."""

    name: str
    resolution_s: int
    points: list[Row[Any]]


# The window is cut at whole buckets of the finest roll-up that is read, so its ends may lie a bucket outside.
_IN_WINDOW = """
    job_id = :job_id
    AND (CAST(:first AS timestamptz) IS NULL OR {at} >= CAST(:first AS timestamptz) - make_interval(secs => {slack_s}))
    AND (CAST(:until AS timestamptz) IS NULL OR {at} < CAST(:until AS timestamptz))
"""
_EXTENTS = text(
    f"""
    SELECT name, min(bucket) AS first, max(bucket) + interval '600 seconds' AS last, sum(count)::bigint AS values
    FROM metric_rollups
    WHERE {_IN_WINDOW.format(at="bucket", slack_s=600)} AND resolution_s = 600
      AND (CAST(:names AS text[]) IS NULL OR name = ANY(CAST(:names AS text[])))
    GROUP BY name ORDER BY name
    """
)
_ROLLED_UP = text(
    f"""
    SELECT to_timestamp(floor(extract(epoch FROM bucket) / :width_s) * :width_s) AS at, max(last_step) AS step,
           min(min) AS min, max(max) AS max, sum(sum) / sum(count) AS mean, sum(count)::bigint AS count
    FROM metric_rollups
    WHERE {_IN_WINDOW.format(at="bucket", slack_s=":resolution_s")} AND name = :name AND resolution_s = :resolution_s
    GROUP BY 1 ORDER BY 1
    """
)
_RAW = text(
    f"""
    WITH steps AS (
        SELECT max(at) AS at, step, min(value) AS min, max(value) AS max, sum(value) AS sum, count(*) AS count
        FROM metrics WHERE {_IN_WINDOW.format(at="at", slack_s=0)} AND name = :name
        GROUP BY attempt_id, step, CASE WHEN step IS NULL THEN at END
    ), numbered AS (
        SELECT *, ((row_number() OVER (ORDER BY at, step) - 1) * :max_points) / greatest(count(*) OVER (), :max_points)
                  AS slot
        FROM steps
    )
    SELECT max(at) AS at, max(step) AS step, min(min) AS min, max(max) AS max, sum(sum) / sum(count) AS mean,
           sum(count)::bigint AS count
    FROM numbered GROUP BY slot ORDER BY 1
    """
)


async def list_extents(
    conn: AsyncConnection, job_id: UUID, *, names: Sequence[str] | None, window: Window
) -> list[Extent]:
    """What there is of each name (None = of all) in a window, by name."""
    values = {"job_id": job_id, "names": names and list(names), "first": window.start, "until": window.end}
    return [Extent(**row._mapping) for row in await conn.execute(_EXTENTS, values)]


async def load_series(
    conn: AsyncConnection, job_id: UUID, extent: Extent, *, window: Window, max_points: int
) -> Series:
    """At most `max_points` points (one more where a bucket is cut by the window)."""
    values = {"job_id": job_id, "name": extent.name, "first": window.start, "until": window.end}
    if extent.values <= ROWS_PER_SERIES:
        points = list(await conn.execute(_RAW, values | {"max_points": max_points}))
        if points:  # else retention has taken the raw points
            return Series(extent.name, 0, points)
    span_s = _span_s(extent, window)
    resolution_s = next((r for r in RESOLUTIONS_S if span_s / r <= ROWS_PER_SERIES), RESOLUTIONS_S[-1])
    width_s = max(1, math.ceil(span_s / max_points / resolution_s)) * resolution_s
    rolled = await conn.execute(_ROLLED_UP, values | {"resolution_s": resolution_s, "width_s": width_s})
    return Series(extent.name, width_s, list(rolled))


def _span_s(extent: Extent, window: Window) -> float:
    first = max(extent.first, window.start) if window.start else extent.first
    last = min(extent.last, window.end) if window.end else extent.last
    return max((last - first).total_seconds(), 1.0)


_PROGRESS = text("SELECT step, total_steps, values, at FROM progress WHERE job_id = :job_id")


async def load_progress(conn: AsyncConnection, job_id: UUID) -> Row[Any] | None:
    """What the job last reported about itself."""
    return (await conn.execute(_PROGRESS, {"job_id": job_id})).one_or_none()
