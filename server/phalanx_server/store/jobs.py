"""Jobs as they are changed by what users ask for: inserted many at a time, locked, changed, one or a whole array.

Owns the statements. `job_views` looks at jobs; what an attempt does to its job is in `attempts`. Refuses to judge
whether a change is legal: the domain does, and SQL's own guard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, any_, bindparam, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.dependencies import insert_dependencies
from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import Uuid, bundles, jobs, tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRow:
    """The jobs that one row stands for: their ids and indices, in the same order."""

    id: UUID
    job_ids: Sequence[UUID]
    indices: Sequence[int]
    max_running: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """What is inserted for one job, or for all jobs of an array, whose names get their index. `after`: what it waits
    for and how (`ok`, `any`), unmet alone."""

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
    deadline: datetime | None = None
    after: Sequence[tuple[UUID, str]] = ()
    array: ArrayRow | None = None

    @property
    def unmet(self) -> int:
        return len(self.after)

    @property
    def job_ids(self) -> Sequence[UUID]:
        return [self.id] if self.array is None else self.array.job_ids


_INSERTED = (
    *("id", "tenant_id", "name", "priority", "spec", "labels", "bundle", "created_by", "traceparent", "received_at"),
    *("submitted_at", "held", "not_before", "deadline", "unmet"),
)
# One statement for any number of jobs: arrays are parsed much faster than a thousand rows of parameters.
_INSERT = text(
    """
    INSERT INTO jobs (id, tenant_id, name, priority, spec, labels, bundle, created_by, traceparent, received_at,
                      submitted_at, queued_at, held, not_before, deadline, unmet)
    SELECT id, tenant_id, name, priority, CAST(spec AS jsonb), CAST(labels AS jsonb), bundle, created_by, traceparent,
           received_at, submitted_at, submitted_at, held, not_before, deadline, unmet
    FROM unnest(CAST(:id AS uuid[]), CAST(:tenant_id AS uuid[]), CAST(:name AS text[]), CAST(:priority AS integer[]),
                CAST(:spec AS text[]), CAST(:labels AS text[]), CAST(:bundle AS text[]), CAST(:created_by AS text[]),
                CAST(:traceparent AS text[]), CAST(:received_at AS timestamptz[]), CAST(:submitted_at AS timestamptz[]),
                CAST(:held AS boolean[]), CAST(:not_before AS timestamptz[]), CAST(:deadline AS timestamptz[]),
                CAST(:unmet AS integer[]))
         AS row (id, tenant_id, name, priority, spec, labels, bundle, created_by, traceparent, received_at,
                 submitted_at, held, not_before, deadline, unmet)
    """
)
# The spec is sent and parsed once.
_INSERT_ARRAY = text(
    """
    INSERT INTO jobs (id, tenant_id, name, priority, spec, labels, bundle, created_by, traceparent, received_at,
                      submitted_at, queued_at, held, not_before, deadline, unmet, array_id, array_index,
                      array_max_running)
    SELECT member.id, alike.tenant_id, format('%s[%s]', alike.name, member.index), alike.priority, alike.spec,
           alike.labels, alike.bundle, alike.created_by, alike.traceparent, alike.received_at, alike.submitted_at,
           alike.submitted_at, alike.held, alike.not_before, alike.deadline, alike.unmet, alike.array_id, member.index,
           alike.max_running
    FROM unnest(CAST(:ids AS uuid[]), CAST(:indices AS integer[])) AS member (id, index),
         (SELECT CAST(:tenant_id AS uuid) AS tenant_id, CAST(:name AS text) AS name,
                 CAST(:priority AS integer) AS priority, CAST(:spec AS jsonb) AS spec, CAST(:labels AS jsonb) AS labels,
                 CAST(:bundle AS text) AS bundle, CAST(:created_by AS text) AS created_by,
                 CAST(:traceparent AS text) AS traceparent, CAST(:received_at AS timestamptz) AS received_at,
                 CAST(:submitted_at AS timestamptz) AS submitted_at, CAST(:held AS boolean) AS held,
                 CAST(:not_before AS timestamptz) AS not_before, CAST(:deadline AS timestamptz) AS deadline,
                 CAST(:unmet AS integer) AS unmet, CAST(:array_id AS uuid) AS array_id,
                 CAST(:max_running AS integer) AS max_running) alike
    """
)


async def insert_jobs(conn: AsyncConnection, rows: Sequence[JobRow]) -> None:
    """Insert queued jobs: all that are no arrays in one statement, each array in one, with what they wait for."""
    plain = [row for row in rows if row.array is None]
    if plain:
        columns = {name: [getattr(row, name) for row in plain] for name in _INSERTED}
        columns["spec"] = [dump_json(row.spec) for row in plain]
        columns["labels"] = [dump_json(row.labels) for row in plain]
        await conn.execute(_INSERT, columns)
    for row in rows:
        if row.array is not None:
            await conn.execute(_INSERT_ARRAY, _array_values(row, row.array))
    await insert_dependencies(conn, [(row.job_ids, row.after) for row in rows if row.after])


def _array_values(row: JobRow, array: ArrayRow) -> dict[str, Any]:
    alike = {name: getattr(row, name) for name in _INSERTED if name != "id"}
    alike |= {"spec": dump_json(row.spec), "labels": dump_json(row.labels)}
    members = {"ids": list(array.job_ids), "indices": list(array.indices)}
    return alike | members | {"array_id": array.id, "max_running": array.max_running}


@dataclass(frozen=True, slots=True)
class LockedJob:
    id: UUID
    name: str
    tenant: str
    state: str
    attempts: int
    held: bool
    cancel_requested_at: datetime | None
    priority: int


async def lock_job(conn: AsyncConnection, job_id: UUID) -> LockedJob | None:
    """A job, locked until the end of the transaction."""
    return next(iter(await _lock(conn, jobs.c.id == job_id)), None)


async def lock_waiting_jobs(conn: AsyncConnection, job_ids: Sequence[UUID]) -> list[LockedJob]:
    """Those of these jobs that are queued, locked until the end of the transaction."""
    wanted = jobs.c.id == any_(bindparam("job_ids", list(job_ids), ARRAY(Uuid)))
    return await _lock(conn, and_(wanted, jobs.c.state == "queued"))


async def lock_array(conn: AsyncConnection, array_id: UUID) -> list[LockedJob]:
    """The jobs of an array, locked until the end of the transaction, by index."""
    return await _lock(conn, jobs.c.array_id == array_id)


async def _lock(conn: AsyncConnection, condition: ColumnElement[bool]) -> list[LockedJob]:
    own = (jobs.c.state, jobs.c.attempts, jobs.c.held, jobs.c.cancel_requested_at, jobs.c.priority)
    statement = select(jobs.c.id, jobs.c.name, tenants.c.path, *own).join(tenants, tenants.c.id == jobs.c.tenant_id)
    statement = statement.where(condition).order_by(jobs.c.id).with_for_update(key_share=True, of=jobs)
    return [LockedJob(*row) for row in await conn.execute(statement)]


async def change_jobs(conn: AsyncConnection, job_ids: Sequence[UUID], values: Mapping[str, Any]) -> None:
    """Set columns of locked jobs; the version of each grows by one."""
    if job_ids:
        condition = jobs.c.id == any_(bindparam("job_ids", list(job_ids), ARRAY(Uuid)))
        await conn.execute(update(jobs).where(condition).values(version=jobs.c.version + 1, **values))


async def change_job(conn: AsyncConnection, job_id: UUID, values: Mapping[str, Any]) -> None:
    """Set columns of a locked job; its version grows by one."""
    await change_jobs(conn, [job_id], values)


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
