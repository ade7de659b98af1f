"""Jobs as they are looked at: with tenant, hold, latest attempt, progress and checkpoint, in one statement.

Owns the read side of jobs. Refuses to change anything, and to decide who may look: callers pass the tenant that they
are confined to. Rows have columns named after the API's fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json
from phalanx_server.store.speeds import FIGURES

# The checkpoint is the one that a resume would take (`attempts.last_checkpoints`).
# One attempt as JSON; `a` is attempts, `b` the attempt before it (its end is when the job was queued again).
# Whom it gives way to is said where its own tenant's people may see that job.
_ATTEMPT = """
    to_jsonb(a) || jsonb_build_object(
        'cluster', (SELECT name FROM clusters WHERE id = a.cluster_id),
        'requeued_at', b.ended_at,
        'placements', (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                'node', n.name, 'replicas', p.replicas, 'gpu_indices', p.gpu_indices, 'first_rank', p.first_rank,
                'ranks', p.ranks, 'address', n.address) ORDER BY p.group_rank), '[]')
            FROM placements p JOIN nodes n ON n.id = p.node_id WHERE p.attempt_id = a.id),
        'stop_for', CASE WHEN a.stop_for IS NOT NULL THEN (
            SELECT f.id FROM jobs f JOIN tenants other ON other.id = f.tenant_id
            JOIN tenants own ON own.id = (SELECT tenant_id FROM jobs WHERE id = a.job_id)
            WHERE f.id = a.stop_for AND (other.path = own.path OR starts_with(other.path, own.path || '/'))) END,
        'next', CASE WHEN a.next IS NOT NULL THEN jsonb_build_object(
            'gpu_type', a.next->'gpu_type', 'placement', (
                SELECT jsonb_agg(jsonb_build_object('node', n.name, 'replicas', (item->>'replicas')::int)
                                 ORDER BY n.name)
                FROM jsonb_array_elements(a.next->'placement') AS item
                JOIN nodes n ON n.id = CAST(item->>'node' AS uuid))) END)
"""

_VIEW = f"""
SELECT j.id, t.path AS tenant, j.name, j.state, j.version, j.priority, j.spec, j.labels, j.bundle, j.created_by,
       j.received_at, j.submitted_at, j.queued_at, j.started_at, j.finished_at, j.cancel_requested_at, j.held,
       j.attempts, j.failures, j.reason, j.message, j.array_id, j.array_index,
       h.reason AS hold_reason, h.message AS hold_message, h.unblocks, h.estimated_start, h.since AS hold_since,
       h.estimated_start_low, h.estimated_start_high,
       CASE WHEN a.id IS NOT NULL THEN {_ATTEMPT} END AS attempt,
       g.step, g.total_steps, g.values, g.at AS progress_at, {FIGURES} AS speeds,
       c.url AS checkpoint_url, c.step AS checkpoint_step, c.registered_at AS checkpoint_at
FROM {{chosen}} chosen
JOIN jobs j USING (id)
JOIN tenants t ON t.id = j.tenant_id
LEFT JOIN holds h ON h.job_id = j.id AND j.state = 'queued'
LEFT JOIN attempts a ON a.job_id = j.id AND a.number = j.attempts
LEFT JOIN attempts b ON b.job_id = j.id AND b.number = j.attempts - 1
LEFT JOIN progress g ON g.job_id = j.id
LEFT JOIN LATERAL (
    SELECT url, step, registered_at FROM checkpoints WHERE job_id = j.id ORDER BY registered_at DESC, step DESC LIMIT 1
) c ON true
ORDER BY j.id DESC
"""

# Paths below `:tenant`, itself included. starts_with, because a path may hold LIKE's wildcards.
SUBTREE = "(path = :tenant OR starts_with(path, :tenant || '/'))"

_BY_IDS = text(_VIEW.format(chosen="(SELECT unnest(CAST(:ids AS uuid[])) AS id)"))
_TENANT_OF = text("SELECT t.path FROM jobs j JOIN tenants t ON t.id = j.tenant_id WHERE j.id = :id")
_END_OF = text("SELECT state, finished_at, attempts FROM jobs WHERE id = :id")
_ATTEMPTS = text(
    f"""
    SELECT {_ATTEMPT} AS attempt, j.received_at, j.submitted_at
    FROM attempts a JOIN jobs j ON j.id = a.job_id
    LEFT JOIN attempts b ON b.job_id = a.job_id AND b.number = a.number - 1
    WHERE a.job_id = :id ORDER BY a.number
    """
)


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows. `confined_to` is the subtree of the caller, `tenant` the one asked for; None = all."""

    confined_to: str | None = None
    tenant: str | None = None
    states: Sequence[str] = ()
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    submitted_after: datetime | None = None
    array: UUID | None = None


@dataclass(frozen=True, slots=True)
class JobEnd:
    """The little that a follower of a job needs to know; `finished_at` None = it is not over."""

    state: str | None
    finished_at: datetime | None
    attempts: int


async def load_jobs(conn: AsyncConnection, ids: Sequence[UUID]) -> list[Row[Any]]:
    """These jobs, newest first; those that do not exist are missing."""
    return list(await conn.execute(_BY_IDS, {"ids": list(ids)}))


async def load_job(conn: AsyncConnection, job_id: UUID) -> Row[Any] | None:
    rows = await load_jobs(conn, [job_id])
    return rows[0] if rows else None


async def tenant_of_job(conn: AsyncConnection, job_id: UUID) -> str | None:
    """The path of the tenant that a job belongs to; None where there is no such job."""
    return (await conn.execute(_TENANT_OF, {"id": job_id})).scalar_one_or_none()


async def job_end(conn: AsyncConnection, job_id: UUID) -> JobEnd:
    """Whether a job is over. One that does not exist is."""
    row = (await conn.execute(_END_OF, {"id": job_id})).one_or_none()
    return JobEnd(*row) if row else JobEnd(None, datetime.min.replace(tzinfo=UTC), 0)


async def list_jobs(conn: AsyncConnection, wanted: JobFilter, *, before: UUID | None, limit: int) -> list[Row[Any]]:
    """At most `limit` jobs, newest first, older than `before`."""
    conditions, values = _conditions(wanted, before)
    tenant = wanted.tenant or wanted.confined_to  # callers have checked that the one lies within the other
    chosen = _CHOOSE_BY_TENANT if tenant else _CHOOSE_BY_STATE if wanted.states else _CHOOSE
    values |= {"limit": limit} | ({"tenant": tenant} if tenant else {})
    statement = text(_VIEW.format(chosen="(" + chosen.format(conditions=" AND ".join(conditions) or "true") + ")"))
    return list(await conn.execute(statement, values))


# By tenant, or else by state, the newest of each are read from their index and merged: the cost does not depend on how
# many other jobs there are.
_NEWEST = "SELECT j.id FROM jobs j WHERE {conditions} ORDER BY j.id DESC LIMIT :limit"
_CHOOSE = _NEWEST
_CHOOSE_BY_TENANT = f"""
    SELECT newest.id
    FROM tenants, LATERAL ({_NEWEST.format(conditions="j.tenant_id = tenants.id AND {conditions}")}) newest
    WHERE {SUBTREE} ORDER BY newest.id DESC LIMIT :limit
"""
_CHOOSE_BY_STATE = f"""
    SELECT newest.id FROM unnest(CAST(:states AS text[])) AS wanted (state),
        LATERAL ({_NEWEST.format(conditions="j.state = wanted.state AND {conditions}")}) newest
    ORDER BY newest.id DESC LIMIT :limit
"""


def _conditions(wanted: JobFilter, before: UUID | None) -> tuple[list[str], dict[str, Any]]:
    given = {
        "j.id < :before": ("before", before),
        "j.state = ANY(:states)": ("states", list(wanted.states) or None),
        "j.name = :name": ("name", wanted.name),
        "j.labels @> CAST(:labels AS jsonb)": ("labels", dump_json(dict(wanted.labels)) if wanted.labels else None),
        "j.submitted_at > :submitted_after": ("submitted_after", wanted.submitted_after),
        "j.array_id = :array": ("array", wanted.array),
    }
    used = {condition: bound for condition, bound in given.items() if bound[1] is not None}
    return list(used), dict(used.values())


async def load_attempts(conn: AsyncConnection, job_id: UUID) -> list[Row[Any]]:
    """All attempts of a job, first to last."""
    return list(await conn.execute(_ATTEMPTS, {"id": job_id}))


async def names_of_jobs(conn: AsyncConnection, jobs: Sequence[str]) -> dict[str, str]:
    """Names by the uuid in hex, which is how snapshots name jobs."""
    query = text("SELECT id, name FROM jobs WHERE id = ANY(CAST(:ids AS uuid[]))")
    rows = await conn.execute(query, {"ids": [UUID(hex=job) for job in jobs]})
    return {row.id.hex: row.name for row in rows}
