"""What is forgotten, and the partitions that are made ahead of time.

Owns the statements. How long anything is kept is the caller's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

BATCH_ROWS = 10_000

_OLD_ROWS = {
    "idempotency_keys": "created_at < :before",
    "outbox": "delivered_at < :before",
    "audit": "at < :before",
    "events": "at < :before AND job_id IS NULL",
    "maintenance": "ends_at < :before",
    "leases": "expires_at < :before AND expires_at < clock_timestamp()",  # one in force is so by the database's clock
    "tokens": "kind = 'node' AND expires_at < :before",
}


async def ensure_partitions(conn: AsyncConnection, *, now: datetime, ahead: timedelta) -> int:
    """Make the partitions of today and of the time ahead; the number of new ones."""
    query = text("SELECT ensure_partitions(:since, :until)")
    return (await conn.execute(query, {"since": now, "until": now + ahead})).scalar_one()


async def drop_metrics(conn: AsyncConnection, *, before: datetime) -> int:
    """Forget raw points older than `before`, by partition; the number of partitions."""
    return (
        await conn.execute(text("SELECT drop_partitions('metrics', 'at', :before)"), {"before": before})
    ).scalar_one()


async def drop_rollups(conn: AsyncConnection, *, before: datetime) -> int:
    """Forget roll-ups older than `before`, by partition; the number of partitions."""
    query = text("SELECT drop_partitions('metric_rollups', 'bucket', :before)")
    return (await conn.execute(query, {"before": before})).scalar_one()


async def delete_old(conn: AsyncConnection, table: str, *, before: datetime) -> bool:
    """Delete at most BATCH_ROWS rows of `table` (a key of _OLD_ROWS) older than `before`; whether there may be more."""
    statement = text(
        f"DELETE FROM {table} WHERE ctid = ANY(ARRAY("
        f"SELECT ctid FROM {table} WHERE {_OLD_ROWS[table]} LIMIT {BATCH_ROWS}))"
    )
    return (await conn.execute(statement, {"before": before})).rowcount == BATCH_ROWS


async def delete_stray_holds(conn: AsyncConnection) -> None:
    """Delete the holds of jobs that do not wait: one may be written while its job is being cancelled."""
    await conn.execute(
        text("DELETE FROM holds h WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = h.job_id AND j.state = 'queued')")
    )


async def delete_old_events(conn: AsyncConnection, *, before: datetime) -> bool:
    """Delete at most BATCH_ROWS events of jobs that are over since `before`; those of live jobs stay, however old.
    Whether there may be more."""
    statement = text(
        "DELETE FROM events WHERE id = ANY(ARRAY(SELECT e.id FROM events e JOIN jobs j ON j.id = e.job_id"
        f" WHERE e.at < :before AND j.finished_at < :before LIMIT {BATCH_ROWS}))"
    )
    return (await conn.execute(statement, {"before": before})).rowcount == BATCH_ROWS


# ------------------------------------------------------------------ files of jobs


@dataclass(frozen=True, slots=True)
class EndedJob:
    finished_at: datetime
    job_id: UUID


_FIRST = EndedJob(datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))
_ENDED = text(
    "SELECT finished_at, id FROM jobs WHERE finished_at < :before AND (finished_at, id) > (:finished_at, :job_id)"
    " ORDER BY finished_at, id LIMIT :limit"
)
_NOTE = text(
    "INSERT INTO retention (what, finished_at, job_id) VALUES (:what, :finished_at, :job_id)"
    " ON CONFLICT (what) DO UPDATE SET finished_at = EXCLUDED.finished_at, job_id = EXCLUDED.job_id"
)


async def ended_jobs(conn: AsyncConnection, what: str, *, before: datetime, limit: int) -> list[EndedJob]:
    """Jobs that ended before a time, in that order, after the last one that `note_forgotten` was told of."""
    query = text("SELECT finished_at, job_id FROM retention WHERE what = :what")
    row = (await conn.execute(query, {"what": what})).one_or_none()
    last = EndedJob(*row) if row is not None else _FIRST
    values = {"before": before, "finished_at": last.finished_at, "job_id": last.job_id, "limit": limit}
    return [EndedJob(*row) for row in await conn.execute(_ENDED, values)]


async def note_forgotten(conn: AsyncConnection, what: str, last: EndedJob) -> None:
    """Nothing is left of `what` of this job and of those that ended before it."""
    await conn.execute(_NOTE, {"what": what, "finished_at": last.finished_at, "job_id": last.job_id})


async def delete_of_jobs(conn: AsyncConnection, table: str, job_ids: Sequence[UUID]) -> bool:
    """Delete at most BATCH_ROWS rows of `table` (of files of jobs) of these jobs; whether there may be more."""
    assert table in ("logs", "outputs", "profiles")
    statement = text(
        f"DELETE FROM {table} WHERE ctid = ANY(ARRAY("
        f"SELECT ctid FROM {table} WHERE job_id = ANY(CAST(:job_ids AS uuid[])) LIMIT {BATCH_ROWS}))"
    )
    return (await conn.execute(statement, {"job_ids": list(job_ids)})).rowcount == BATCH_ROWS
