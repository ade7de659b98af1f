"""Jobs as they are changed by what users ask for: inserted many at a time, locked, changed.

Owns the statements. `job_views` looks at jobs; what an attempt does to its job is in `attempts`. Refuses to judge
whether a change is legal: the domain does, and SQL's own guard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import bundles, jobs, tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """What is inserted for one job."""

    id: UUID
    tenant_id: UUID
    name: str
    priority: int
    spec: Mapping[str, Any]
    labels: Mapping[str, str]
    bundle: str | None
    created_by: str
    traceparent: str | None
    received_at: datetime
    submitted_at: datetime
    held: bool
    not_before: datetime | None


# One statement for any number of jobs: arrays are parsed much faster than a thousand rows of parameters.
_INSERT = text(
    """
    INSERT INTO jobs (id, tenant_id, name, priority, spec, labels, bundle, created_by, traceparent, received_at,
                      submitted_at, queued_at, held, not_before)
    SELECT id, tenant_id, name, priority, CAST(spec AS jsonb), CAST(labels AS jsonb), bundle, created_by, traceparent,
           received_at, submitted_at, submitted_at, held, not_before
    FROM unnest(CAST(:id AS uuid[]), CAST(:tenant_id AS uuid[]), CAST(:name AS text[]), CAST(:priority AS integer[]),
                CAST(:spec AS text[]), CAST(:labels AS text[]), CAST(:bundle AS text[]), CAST(:created_by AS text[]),
                CAST(:traceparent AS text[]), CAST(:received_at AS timestamptz[]), CAST(:submitted_at AS timestamptz[]),
                CAST(:held AS boolean[]), CAST(:not_before AS timestamptz[]))
         AS row (id, tenant_id, name, priority, spec, labels, bundle, created_by, traceparent, received_at,
                 submitted_at, held, not_before)
    """
)


async def insert_jobs(conn: AsyncConnection, rows: Sequence[JobRow]) -> None:
    """Insert queued jobs in one statement."""
    columns = {name: [getattr(row, name) for row in rows] for name in JobRow.__slots__}
    columns["spec"] = [dump_json(row.spec) for row in rows]
    columns["labels"] = [dump_json(row.labels) for row in rows]
    await conn.execute(_INSERT, columns)


@dataclass(frozen=True, slots=True)
class LockedJob:
    id: UUID
    name: str
    tenant: str
    state: str
    attempts: int
    held: bool
    cancel_requested_at: datetime | None


async def lock_job(conn: AsyncConnection, job_id: UUID) -> LockedJob | None:
    """A job, locked until the end of the transaction."""
    own = (jobs.c.state, jobs.c.attempts, jobs.c.held, jobs.c.cancel_requested_at)
    statement = select(jobs.c.id, jobs.c.name, tenants.c.path, *own).join(tenants, tenants.c.id == jobs.c.tenant_id)
    statement = statement.where(jobs.c.id == job_id).with_for_update(key_share=True, of=jobs)
    row = (await conn.execute(statement)).one_or_none()
    return LockedJob(*row) if row else None


async def change_job(conn: AsyncConnection, job_id: UUID, values: Mapping[str, Any]) -> None:
    """Set columns of a locked job; its version grows by one."""
    await conn.execute(update(jobs).where(jobs.c.id == job_id).values(version=jobs.c.version + 1, **values))


async def missing_bundles(conn: AsyncConnection, wanted: Iterable[tuple[UUID, str]]) -> set[tuple[UUID, str]]:
    """Those of the (tenant, hash) pairs that were not uploaded. The others are marked as used, once an hour, and none
    is forgotten before the transaction ends."""
    pairs = set(wanted)
    if not pairs:
        return set()
    key = tuple_(bundles.c.tenant_id, bundles.c.hash)
    rows = await conn.execute(select(bundles.c.tenant_id, bundles.c.hash, _STALE).where(key.in_(pairs)))
    found = {(row.tenant_id, row.hash): row.stale for row in rows}
    idle = {pair for pair, stale in found.items() if stale}
    return pairs - found.keys() | await _mark_used(conn, idle)


async def _mark_used(conn: AsyncConnection, pairs: set[tuple[UUID, str]]) -> set[tuple[UUID, str]]:
    """Those that are not there any more. Waits for whoever is forgetting one just now, in one order of locks."""
    if not pairs:
        return set()
    key = tuple_(bundles.c.tenant_id, bundles.c.hash)
    there = select(bundles.c.tenant_id, bundles.c.hash).where(key.in_(pairs)).order_by(*key)
    rows = await conn.execute(there.with_for_update(key_share=True))
    locked = {(row.tenant_id, row.hash) for row in rows}
    if locked:
        await conn.execute(update(bundles).where(key.in_(locked)).values(used_at=func.now()))
    return pairs - locked


_STALE = (bundles.c.used_at < func.now() - text("interval '1 hour'")).label("stale")


async def insert_bundle(conn: AsyncConnection, tenant_id: UUID, *, digest: str, size_bytes: int) -> bool:
    """Whether the tenant did not have it yet; if it did, it counts as used now."""
    statement = upsert(bundles).values(tenant_id=tenant_id, hash=digest, bytes=size_bytes)
    statement = statement.on_conflict_do_update(
        index_elements=[bundles.c.tenant_id, bundles.c.hash], set_={"used_at": func.now()}
    )
    fresh = await conn.execute(statement.returning(text("(xmax = 0) AS fresh")))
    return bool(fresh.scalar_one())
