"""Metrics of jobs: raw points, roll-ups at 10 s, 1 min and 10 min, and the latest progress.

Owns how a batch of points is rolled up and written, set-based: a few statements for any number of points. Refuses to
judge names and values: the action has done so. Reading is the business of the views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json

RESOLUTIONS_S = (10, 60, 600)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one rank; `at_s` in seconds since the epoch, finite like `value`."""

    rank: int
    name: str
    step: int | None
    value: float
    at_s: float


@dataclass(slots=True)
class Rollup:
    """What is kept of all values of a name in a bucket."""

    min: float
    max: float
    sum: float
    count: int
    last_step: int | None

    def add(self, other: Rollup) -> None:
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self.sum += other.sum
        self.count += other.count
        self.last_step = _latest(self.last_step, other.last_step)


def roll_up(points: Iterable[Point]) -> dict[tuple[str, int, int], Rollup]:
    """Roll-ups by (name, resolution_s, bucket start in seconds): 10 s from the points, the others from those."""
    out: dict[tuple[str, int, int], Rollup] = {}
    finest = RESOLUTIONS_S[0]
    for point in points:
        key = (point.name, finest, int(point.at_s // finest) * finest)
        _merge(out, key, Rollup(point.value, point.value, point.value, 1, point.step))
    for (name, _, bucket), rollup in list(out.items()):
        for resolution_s in RESOLUTIONS_S[1:]:
            key = (name, resolution_s, bucket // resolution_s * resolution_s)
            _merge(out, key, Rollup(rollup.min, rollup.max, rollup.sum, rollup.count, rollup.last_step))
    return out


def _merge(out: dict[tuple[str, int, int], Rollup], key: tuple[str, int, int], rollup: Rollup) -> None:
    if key in out:
        out[key].add(rollup)
    else:
        out[key] = rollup


def _latest(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


_INSERT_POINTS = text(
    """
    INSERT INTO metrics (job_id, attempt_id, rank, name, step, value, at)
    SELECT :job_id, :attempt_id, rank, name, step, value, to_timestamp(at_s)
    FROM unnest(CAST(:ranks AS integer[]), CAST(:names AS text[]), CAST(:steps AS bigint[]),
                CAST(:points AS double precision[]), CAST(:ats AS double precision[]))
         AS point (rank, name, step, value, at_s)
    """
)

# In the order of the key: two nodes of one job that report at once must lock its buckets in the same order.
_UPSERT_ROLLUPS = text(
    """
    INSERT INTO metric_rollups AS old (job_id, name, resolution_s, bucket, min, max, sum, count, last_step)
    SELECT :job_id, name, resolution_s, to_timestamp(bucket_s), low, high, total, number, last_step
    FROM unnest(CAST(:names AS text[]), CAST(:resolutions AS integer[]), CAST(:buckets AS bigint[]),
                CAST(:mins AS double precision[]), CAST(:maxs AS double precision[]),
                CAST(:sums AS double precision[]), CAST(:counts AS bigint[]), CAST(:steps AS bigint[]))
         AS rollup (name, resolution_s, bucket_s, low, high, total, number, last_step)
    ORDER BY name, resolution_s, bucket_s
    ON CONFLICT (job_id, name, resolution_s, bucket) DO UPDATE SET
        min = LEAST(old.min, EXCLUDED.min), max = GREATEST(old.max, EXCLUDED.max),
        sum = old.sum + EXCLUDED.sum, count = old.count + EXCLUDED.count,
        last_step = GREATEST(old.last_step, EXCLUDED.last_step)
    """
)


async def insert_points(conn: AsyncConnection, *, job_id: UUID, attempt_id: UUID, points: Sequence[Point]) -> None:
    """Write points of one attempt and add them to the job's roll-ups."""
    if not points:
        return
    await conn.execute(
        _INSERT_POINTS,
        {
            "job_id": job_id,
            "attempt_id": attempt_id,
            "ranks": [point.rank for point in points],
            "names": [point.name for point in points],
            "steps": [point.step for point in points],
            "points": [point.value for point in points],
            "ats": [point.at_s for point in points],
        },
    )
    await _upsert_rollups(conn, job_id, roll_up(points))


async def _upsert_rollups(conn: AsyncConnection, job_id: UUID, rollups: Mapping[tuple[str, int, int], Rollup]) -> None:
    keys, values = list(rollups), list(rollups.values())
    await conn.execute(
        _UPSERT_ROLLUPS,
        {
            "job_id": job_id,
            "names": [name for name, _, _ in keys],
            "resolutions": [resolution_s for _, resolution_s, _ in keys],
            "buckets": [bucket for _, _, bucket in keys],
            "mins": [value.min for value in values],
            "maxs": [value.max for value in values],
            "sums": [value.sum for value in values],
            "counts": [value.count for value in values],
            "steps": [value.last_step for value in values],
        },
    )


@dataclass(slots=True)
class Progress:
    """The latest that an attempt said of itself."""

    at: datetime
    step: int | None = None
    total_steps: int | None = None
    values: dict[str, float] = field(default_factory=dict)


# Values merge by name, so that what is reported every hundredth step stays in view; a new attempt starts afresh.
_UPSERT_PROGRESS = text(
    """
    INSERT INTO progress AS old (job_id, attempt_id, step, total_steps, values, at)
    VALUES (:job_id, :attempt_id, :step, :total_steps, CAST(:latest AS jsonb), :at)
    ON CONFLICT (job_id) DO UPDATE SET
        attempt_id = EXCLUDED.attempt_id,
        step = CASE WHEN old.attempt_id = EXCLUDED.attempt_id
                    THEN GREATEST(old.step, EXCLUDED.step) ELSE EXCLUDED.step END,
        total_steps = COALESCE(EXCLUDED.total_steps, old.total_steps),
        values = CASE WHEN old.attempt_id <> EXCLUDED.attempt_id THEN EXCLUDED.values
                      WHEN EXCLUDED.at >= old.at THEN old.values || EXCLUDED.values
                      ELSE EXCLUDED.values || old.values END,
        at = CASE WHEN old.attempt_id = EXCLUDED.attempt_id
                  THEN GREATEST(old.at, EXCLUDED.at) ELSE EXCLUDED.at END
    """
)


async def upsert_progress(conn: AsyncConnection, *, job_id: UUID, attempt_id: UUID, progress: Progress) -> None:
    """Merge into the job's progress."""
    await conn.execute(
        _UPSERT_PROGRESS,
        {
            "job_id": job_id,
            "attempt_id": attempt_id,
            "step": progress.step,
            "total_steps": progress.total_steps,
            "latest": dump_json(progress.values),
            "at": progress.at,
        },
    )


_NEW_NAMES = text(
    """
    SELECT wanted.name FROM unnest(CAST(:names AS text[])) AS wanted (name)
    WHERE NOT EXISTS (
        SELECT FROM metric_rollups r WHERE r.job_id = :job_id AND r.name = wanted.name AND r.resolution_s = 600)
    """
)

# A skip scan along the primary key: one index probe per distinct name, however many buckets there are.
_COUNT_NAMES = text(
    """
    WITH RECURSIVE names AS (
        (SELECT name FROM metric_rollups WHERE job_id = :job_id ORDER BY name LIMIT 1)
        UNION ALL
        SELECT (SELECT r.name FROM metric_rollups r WHERE r.job_id = :job_id AND r.name > names.name
                ORDER BY r.name LIMIT 1)
        FROM names WHERE names.name IS NOT NULL
    )
    SELECT count(name) FROM names
    """
)


async def names_over_limit(conn: AsyncConnection, *, job_id: UUID, names: Iterable[str], limit: int) -> set[str]:
    """Those of `names` that would be new to the job and for which there is no room below `limit` distinct names."""
    parameters: dict[str, Any] = {"job_id": job_id, "names": sorted(set(names))}
    new = sorted((await conn.execute(_NEW_NAMES, parameters)).scalars())
    if not new:
        return set()
    known = (await conn.execute(_COUNT_NAMES, {"job_id": job_id})).scalar_one()
    return set(new[max(0, limit - known) :])
