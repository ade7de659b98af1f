"""How fast elastic jobs are with each number of replicas: what was read of them, and as a pass sees it.

Owns the rows of `speeds`, one for each GPU type and number of replicas that a job has run with, or that earlier jobs of
its kind (tenant, user, name and GPUs of a replica) had. Refuses to add up readings: `domain.speed` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.speed import Measured, Reading
from phalanx_server.scheduling.speedup import speedup_of


@dataclass(frozen=True, slots=True)
class Place:
    """Of which job, GPU type (`` for a CPU job) and number of replicas a figure is."""

    job_id: UUID
    gpu_type: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A running elastic job: what it has reported, and what was known before."""

    place: Place
    reading: Reading
    before: Measured | None


# By `jobs_elastic`. What comes before the job has settled is left out.
_SEEN = text(
    """
    SELECT j.id AS job_id, a.gpu_type, a.replicas, a.id AS attempt_id, p.step, p.values,
           CAST(extract(epoch FROM p.at) AS double precision) AS at_s,
           s.unit, s.attempt_id AS last_attempt, CAST(extract(epoch FROM s.at) AS double precision) AS last_at_s,
           s.step AS last_step, s.work, s.seconds, s.counted, s.speed
    FROM jobs j JOIN attempts a ON a.job_id = j.id AND a.state = 'running' AND a.started_at IS NOT NULL
    JOIN progress p ON p.job_id = j.id AND p.attempt_id = a.id
    LEFT JOIN speeds s ON s.job_id = j.id AND s.gpu_type = a.gpu_type AND s.replicas = a.replicas
    WHERE j.state = 'running' AND j.spec->'resources'->'elastic' <> 'null'
      AND p.at >= coalesce(a.first_step_at, a.started_at) + make_interval(secs => :settle_s)
      AND (s.at IS NULL OR s.attempt_id <> a.id OR p.at > s.at)
    """
)
# Of two schedulers that believe to lead, the later reading stays: it counts from the same figures as the earlier one.
_WRITE = text(
    """
    INSERT INTO speeds AS old (job_id, gpu_type, replicas, unit, attempt_id, at, step, work, seconds, counted, speed)
    SELECT job_id, gpu_type, replicas, unit, attempt_id, to_timestamp(at_s), step, work, seconds, counted, speed
    FROM unnest(CAST(:job_id AS uuid[]), CAST(:gpu_type AS text[]), CAST(:replicas AS integer[]),
                CAST(:unit AS text[]), CAST(:attempt_id AS uuid[]), CAST(:at_s AS double precision[]),
                CAST(:step AS bigint[]), CAST(:work AS double precision[]), CAST(:seconds AS double precision[]),
                CAST(:counted AS bigint[]), CAST(:speed AS double precision[]))
         AS row (job_id, gpu_type, replicas, unit, attempt_id, at_s, step, work, seconds, counted, speed)
    ORDER BY job_id
    ON CONFLICT (job_id, gpu_type, replicas) DO UPDATE SET
        unit = EXCLUDED.unit, attempt_id = EXCLUDED.attempt_id, at = EXCLUDED.at, step = EXCLUDED.step,
        work = EXCLUDED.work, seconds = EXCLUDED.seconds, counted = EXCLUDED.counted, speed = EXCLUDED.speed
    WHERE old.attempt_id IS DISTINCT FROM EXCLUDED.attempt_id OR old.at < EXCLUDED.at
    """
)


async def running_elastic(conn: AsyncConnection, *, settle_s: float) -> list[Seen]:
    """The elastic jobs that have reported something since they were looked at last."""
    return [_seen(row) for row in await conn.execute(_SEEN, {"settle_s": settle_s})]


def _seen(row: Row[Any]) -> Seen:
    reading = Reading(attempt=row.attempt_id.hex, at_s=row.at_s, step=row.step, values=row.values)
    place = Place(row.job_id, row.gpu_type, row.replicas)
    if row.last_at_s is None:
        return Seen(place, reading, None)
    before = Measured(
        unit=row.unit,
        attempt=row.last_attempt.hex,
        at_s=row.last_at_s,
        step=row.last_step,
        work=row.work,
        seconds=row.seconds,
        counted=row.counted,
        speed=row.speed,
    )
    return Seen(place, reading, before)


# As with a release, what a pass is told of a job shows as a change of the job. In one order, as all who lock jobs.
_TOUCH = text(
    """
    UPDATE jobs SET version = version
    WHERE id IN (SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])) ORDER BY id FOR NO KEY UPDATE)
    """
)


async def write_speeds(
    conn: AsyncConnection, rows: Sequence[tuple[Place, Measured]], *, told_anew: Sequence[UUID]
) -> None:
    """Store what is known now; passes are to read again the jobs of which something else is told."""
    if told_anew:
        await conn.execute(_TOUCH, {"ids": list(told_anew)})
    if not rows:
        return
    values: dict[str, list[Any]] = {
        "job_id": [place.job_id for place, _ in rows],
        "gpu_type": [place.gpu_type for place, _ in rows],
        "replicas": [place.replicas for place, _ in rows],
        "attempt_id": [UUID(hex=known.attempt) for _, known in rows],
    }
    for name in ("unit", "at_s", "step", "work", "seconds", "counted", "speed"):
        values[name] = [getattr(known, name) for _, known in rows]
    await conn.execute(_WRITE, values)


# ------------------------------------------------------------------ earlier jobs of the same kind

EARLIER_JOBS = 50
"""So many of the newest of a name are looked at."""
_EARLIER = text(
    """
    SELECT wanted.id AS job_id, s.gpu_type, s.replicas, s.unit, s.speed, s.history, s.at
    FROM unnest(CAST(:ids AS uuid[])) AS wanted (id) JOIN jobs j ON j.id = wanted.id
    CROSS JOIN LATERAL (
        SELECT p.id FROM (
            SELECT id, tenant_id, created_by, spec FROM jobs
            WHERE name = j.name AND id < j.id ORDER BY id DESC LIMIT :most
        ) p
        WHERE p.tenant_id = j.tenant_id AND p.created_by = j.created_by
          AND p.spec->'resources'->'gpus_per_replica' = j.spec->'resources'->'gpus_per_replica'
          AND EXISTS (SELECT FROM speeds s WHERE s.job_id = p.id AND (s.speed IS NOT NULL OR s.history IS NOT NULL))
        ORDER BY p.id DESC LIMIT 1
    ) earlier
    JOIN speeds s ON s.job_id = earlier.id
    """
)
_INHERIT = text(
    """
    INSERT INTO speeds (job_id, gpu_type, replicas, history)
    SELECT * FROM unnest(CAST(:job_id AS uuid[]), CAST(:gpu_type AS text[]), CAST(:replicas AS integer[]),
                         CAST(:history AS double precision[]))
    ON CONFLICT DO NOTHING
    """
)


async def inherit(conn: AsyncConnection, job_ids: Sequence[UUID]) -> None:
    """Let these jobs, which start for the first time, have what the newest earlier one of their kind had, until they
    are measured themselves."""
    if not job_ids:
        return
    found: dict[tuple[UUID, str], list[Row[Any]]] = defaultdict(list)
    for row in await conn.execute(_EARLIER, {"ids": list(job_ids), "most": EARLIER_JOBS}):
        found[row.job_id, row.gpu_type].append(row)
    rows = [
        (job_id, gpu_type, int(replicas), relative)
        for (job_id, gpu_type), figures in found.items()
        for replicas, relative in (_curve([Figure(**_plain(row)) for row in figures]) or {}).items()
    ]
    if rows:
        columns = zip(("job_id", "gpu_type", "replicas", "history"), zip(*rows, strict=True), strict=True)
        await conn.execute(_INHERIT, {name: list(column) for name, column in columns})


# ------------------------------------------------------------------ as a pass sees them

FIGURES = """
    CASE WHEN j.spec->'resources'->'elastic' <> 'null' THEN (
        SELECT json_agg(json_build_array(s.gpu_type, s.replicas, s.unit, s.speed, s.history, s.seconds,
                                         CAST(extract(epoch FROM s.at) AS double precision))
                        ORDER BY s.gpu_type, s.replicas)
        FROM speeds s WHERE s.job_id = j.id AND (s.speed IS NOT NULL OR s.history IS NOT NULL)
    ) END
"""
"""A part of a statement: what is told of the job `j`, for `figures_of`."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Progress per second with so many replicas, if it was measured, as of `at`; and relative to one replica, if an
    earlier job of the kind had it."""

    gpu_type: str
    replicas: int
    unit: str | None
    speed: float | None
    history: float | None
    seconds: float
    at: float | None


def figures_of(told: Sequence[Sequence[Any]] | None) -> list[Figure]:
    """From `FIGURES`, by GPU type and number of replicas."""
    return [Figure(*each) for each in told or ()]


def speedup_in(told: Sequence[Sequence[Any]] | None, gpu_type: str | None) -> Mapping[str, float] | None:
    """The `speedup` of a job on a GPU type; of one that waits (None), on the one that was measured last."""
    if not told:
        return None
    figures = figures_of(told)
    on = gpu_type if gpu_type is not None else max(figures, key=_age).gpu_type
    return _curve([figure for figure in figures if figure.gpu_type == on])


def _curve(figures: Sequence[Figure]) -> dict[str, float] | None:
    """As the job itself was measured, where it was with two numbers of replicas at least; else as earlier ones were."""
    own = [figure for figure in figures if figure.speed is not None]
    unit = max(own, key=_age).unit if own else None
    measured = {each.replicas: each.speed for each in own if each.unit == unit and each.speed is not None}
    before = {each.replicas: each.history for each in figures if each.history is not None}
    return speedup_of(measured) or ({str(n): s for n, s in sorted(before.items())} if len(before) > 1 else None)


def _age(figure: Figure) -> float:
    return figure.at if figure.at is not None else float("-inf")


def _plain(row: Row[Any]) -> dict[str, Any]:
    at = row.at.timestamp() if row.at is not None else None
    shown = {name: row._mapping[name] for name in ("gpu_type", "replicas", "unit", "speed", "history")}
    return shown | {"seconds": 0.0, "at": at}
