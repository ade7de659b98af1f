"""What jobs wait for: unmet dependencies, on jobs and on whole arrays, and what became of those.

Owns the rows of `dependencies` and the count of them in `jobs.unmet`. Refuses to judge: the domain says what is met,
and actions carry it out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.job import JobState

BAD = (JobState.FAILED.value, JobState.CANCELLED.value)

# ------------------------------------------------------------------ inserted

_INSERT = text(
    """
    INSERT INTO dependencies (job_id, on_id, kind)
    SELECT * FROM unnest(CAST(:job_ids AS uuid[]), CAST(:on_ids AS uuid[]), CAST(:kinds AS text[]))
    """
)
_INSERT_FOR_ALL = text(
    """
    INSERT INTO dependencies (job_id, on_id, kind)
    SELECT member.id, dependency.on_id, dependency.kind
    FROM unnest(CAST(:job_ids AS uuid[])) AS member (id),
         unnest(CAST(:on_ids AS uuid[]), CAST(:kinds AS text[])) AS dependency (on_id, kind)
    """
)

Waits = tuple[Sequence[UUID], Sequence[tuple[UUID, str]]]
"""Jobs that wait for the same: their ids; and what for, with how."""


async def insert_dependencies(conn: AsyncConnection, waits: Sequence[Waits]) -> None:
    """Of jobs alone in one statement, of each array in one."""
    alone = [(job_ids[0], on_id, kind) for job_ids, after in waits if len(job_ids) == 1 for on_id, kind in after]
    if alone:
        job_ids, on_ids, kinds = map(list, zip(*alone, strict=True))
        await conn.execute(_INSERT, {"job_ids": job_ids, "on_ids": on_ids, "kinds": kinds})
    for members, after in waits:
        if len(members) > 1:
            on_ids, kinds = map(list, zip(*after, strict=True))
            await conn.execute(_INSERT_FOR_ALL, {"job_ids": list(members), "on_ids": on_ids, "kinds": kinds})


# ------------------------------------------------------------------ looked at before a submit


@dataclass(slots=True)
class Target:
    """A job, or an array as a whole, that somebody wants to wait for. `bad`: a job of it that failed or was cancelled,
    by name and state."""

    tenant: str
    is_array: bool
    is_open: bool = False
    bad: tuple[str, str] | None = None


_TARGETS = """
    SELECT j.id, j.array_id, j.name, j.state, t.path AS tenant
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    WHERE j.id = ANY(CAST(:ids AS uuid[])) OR j.array_id = ANY(CAST(:ids AS uuid[]))
    ORDER BY j.id
"""


async def load_targets(conn: AsyncConnection, ids: Collection[UUID], *, lock: bool) -> dict[UUID, Target]:
    """What these jobs and arrays are; those that do not exist are missing. Locked, none of them ends before the
    transaction does, so that who ends it later sees who waits for it."""
    if not ids:
        return {}
    rows = await conn.execute(text(_TARGETS + (" FOR SHARE OF j" if lock else "")), {"ids": list(ids)})
    targets: dict[UUID, Target] = {}
    for row in rows:
        for id_ in {row.id, row.array_id} & set(ids):
            target = targets.setdefault(id_, Target(row.tenant, is_array=id_ == row.array_id))
            target.is_open |= row.state not in (*BAD, JobState.SUCCEEDED)
            if row.state in BAD:
                target.bad = target.bad or (row.name, row.state)
    return targets


# ------------------------------------------------------------------ settled

_AWAITED = text(
    """
    SELECT j.id AS job_id, j.array_id, j.name, j.state, t.path AS tenant,
           EXISTS (SELECT FROM dependencies WHERE on_id = j.id) AS itself,
           EXISTS (SELECT FROM dependencies WHERE on_id = j.array_id) AS as_array
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    WHERE j.id = ANY(CAST(:ids AS uuid[])) AND (
        EXISTS (SELECT FROM dependencies WHERE on_id = j.id)
        OR EXISTS (SELECT FROM dependencies WHERE on_id = j.array_id))
    """
)
_LOCK_ENDS = text("SELECT pg_advisory_xact_lock(hashtext('array ends'), hashtext(:array))")
_LOCK_WAITING = text(
    """
    SELECT j.id, j.name, j.state, j.attempts, t.path AS tenant FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    WHERE j.id IN (SELECT job_id FROM dependencies
                   WHERE on_id = ANY(CAST(:over AS uuid[])) OR (on_id = ANY(CAST(:bad AS uuid[])) AND kind = 'ok'))
    ORDER BY j.id FOR NO KEY UPDATE OF j
    """
)
_UNMET = text(
    """
    SELECT d.job_id, d.on_id, d.kind FROM dependencies d
    WHERE d.job_id = ANY(CAST(:job_ids AS uuid[])) AND d.on_id = ANY(CAST(:on_ids AS uuid[]))
    """
)
_OPEN = text(
    """
    SELECT target.id, EXISTS (SELECT FROM jobs WHERE id = target.id AND finished_at IS NULL)
           OR EXISTS (SELECT FROM jobs WHERE array_id = target.id AND finished_at IS NULL) AS is_open
    FROM unnest(CAST(:ids AS uuid[])) AS target (id)
    """
)
_BAD = text(
    """
    SELECT DISTINCT ON (target.id) target.id, j.id AS job_id, j.name, j.state, t.path AS tenant
    FROM unnest(CAST(:ids AS uuid[])) AS target (id)
    JOIN jobs j ON j.array_id = target.id JOIN tenants t ON t.id = j.tenant_id
    WHERE j.state IN ('failed', 'cancelled')
    """
)
# The index is read from one target to the next, however many wait for each.
_OVERLOOKED = text(
    """
    WITH RECURSIVE target AS (
        (SELECT on_id FROM dependencies ORDER BY on_id LIMIT 1)
        UNION ALL
        SELECT (SELECT d.on_id FROM dependencies d WHERE d.on_id > target.on_id ORDER BY d.on_id LIMIT 1)
        FROM target WHERE target.on_id IS NOT NULL
    )
    SELECT ended.id
    FROM target, LATERAL (SELECT id FROM jobs WHERE id = target.on_id
                          UNION ALL SELECT id FROM jobs WHERE array_id = target.on_id LIMIT 1) ended
    WHERE NOT EXISTS (SELECT FROM jobs WHERE id = target.on_id AND finished_at IS NULL)
      AND NOT EXISTS (SELECT FROM jobs WHERE array_id = target.on_id AND finished_at IS NULL)
    LIMIT :limit
    """
)
_FORGET = text(
    """
    WITH met AS (
        DELETE FROM dependencies d
        USING unnest(CAST(:job_ids AS uuid[]), CAST(:on_ids AS uuid[]), CAST(:kinds AS text[])) AS m (job, on_id, kind)
        WHERE d.job_id = m.job AND d.on_id = m.on_id AND d.kind = m.kind RETURNING d.job_id
    )
    UPDATE jobs j SET unmet = unmet - gone.count, version = version + 1
    FROM (SELECT job_id, count(*) AS count FROM met GROUP BY job_id) gone WHERE j.id = gone.job_id
    RETURNING j.id, j.unmet
    """
)
_FORGET_ALL = text("DELETE FROM dependencies WHERE job_id = ANY(CAST(:ids AS uuid[]))")


async def awaited(conn: AsyncConnection, ended: Sequence[UUID]) -> list[Row[Any]]:
    """Those of these jobs for which, or for whose array, somebody waits; and for which of the two."""
    return list(await conn.execute(_AWAITED, {"ids": list(ended)}))


async def overlooked(conn: AsyncConnection, *, limit: int) -> list[UUID]:
    """A job each of at most so many jobs and arrays that are over, and for which somebody still waits."""
    return list((await conn.execute(_OVERLOOKED, {"limit": limit})).scalars())


async def lock_ends(conn: AsyncConnection, array_ids: Collection[UUID]) -> None:
    """Be the only transaction that ends jobs of these arrays, whoever waits for them: of two that end the last jobs of
    an array the second sees here what the first has ended."""
    for array_id in sorted(array_ids):
        await conn.execute(_LOCK_ENDS, {"array": array_id.hex})


async def lock_waiting(conn: AsyncConnection, *, over: Collection[UUID], bad: Collection[UUID]) -> list[Row[Any]]:
    """The jobs that wait for any of those that are over, and those for which one that is `bad` was to succeed; locked.
    Whom the end of one job of an array does not concern is left alone: else an array that waits for an array costs the
    product of the two."""
    return list(await conn.execute(_LOCK_WAITING, {"over": list(over), "bad": list(bad)}))


async def unmet(conn: AsyncConnection, job_ids: Collection[UUID], on_ids: Collection[UUID]) -> list[Row[Any]]:
    """What of these the jobs wait for."""
    return list(await conn.execute(_UNMET, {"job_ids": list(job_ids), "on_ids": list(on_ids)}))


async def still_open(conn: AsyncConnection, ids: Collection[UUID]) -> dict[UUID, bool]:
    """Whether each job, or some job of each array, has not ended."""
    return {row.id: row.is_open for row in await conn.execute(_OPEN, {"ids": list(ids)})}


async def bad_of_arrays(conn: AsyncConnection, ids: Collection[UUID]) -> Mapping[UUID, Row[Any]]:
    """A job of each of these arrays that failed or was cancelled, where there is one."""
    return {row.id: row for row in await conn.execute(_BAD, {"ids": list(ids)})} if ids else {}


async def forget_met(conn: AsyncConnection, met: Sequence[Row[Any]]) -> dict[UUID, int]:
    """Take met dependencies (rows of `unmet`) out; for how many more each job waits."""
    if not met:
        return {}
    columns = {"job_ids": [d.job_id for d in met], "on_ids": [d.on_id for d in met], "kinds": [d.kind for d in met]}
    return {row.id: row.unmet for row in await conn.execute(_FORGET, columns)}


async def forget_all(conn: AsyncConnection, job_ids: Collection[UUID]) -> None:
    """Of jobs that have ended: they wait for nothing any more."""
    if job_ids:
        await conn.execute(_FORGET_ALL, {"ids": list(job_ids)})
