"""Holds: why each queued job waits, as the last pass said, and the place that is kept for it.

Owns the rows, which are locked in the order of their jobs. A job that is not queued gets none, and how long a reason
has held is kept when only its words change; so is what was first said of its start, for as long as the job waits.
What is kept is part of a job's scheduling state: where it changes, the job's row does (a trigger), and is locked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.store.engine import dump_json
from phalanx_server.store.seats import dump_seat


@dataclass(frozen=True, slots=True)
class HoldRow:
    job_id: UUID
    reason: str
    message: str
    unblocks: tuple[str, ...]
    estimated_start: datetime | None
    kept: Seat | None = None
    estimated_start_low: datetime | None = None
    estimated_start_high: datetime | None = None


_UPSERT = text(
    """
    INSERT INTO holds AS old (job_id, reason, message, unblocks, estimated_start, since, kept,
                              estimated_start_low, estimated_start_high, first_start, first_start_low, first_start_high)
    SELECT j.id, hold.reason, hold.message, CAST(hold.unblocks AS jsonb), hold.estimated_start, :now,
           CAST(hold.kept AS jsonb), hold.low, hold.high, hold.estimated_start, hold.low, hold.high
    FROM unnest(CAST(:jobs AS uuid[]), CAST(:reasons AS text[]), CAST(:messages AS text[]),
                CAST(:unblocks AS text[]), CAST(:estimates AS timestamptz[]), CAST(:kept AS text[]),
                CAST(:lows AS timestamptz[]), CAST(:highs AS timestamptz[]))
         AS hold (job_id, reason, message, unblocks, estimated_start, kept, low, high)
    JOIN jobs j ON j.id = hold.job_id AND j.state = 'queued'
    ORDER BY j.id
    ON CONFLICT (job_id) DO UPDATE SET
        reason = EXCLUDED.reason, message = EXCLUDED.message, unblocks = EXCLUDED.unblocks,
        estimated_start = EXCLUDED.estimated_start, kept = EXCLUDED.kept,
        estimated_start_low = EXCLUDED.estimated_start_low, estimated_start_high = EXCLUDED.estimated_start_high,
        first_start = coalesce(old.first_start, EXCLUDED.first_start),
        first_start_low = CASE WHEN old.first_start IS NULL THEN EXCLUDED.first_start_low ELSE old.first_start_low END,
        first_start_high =
            CASE WHEN old.first_start IS NULL THEN EXCLUDED.first_start_high ELSE old.first_start_high END,
        since = CASE WHEN old.reason = EXCLUDED.reason THEN old.since ELSE EXCLUDED.since END
    """
)


# The first expected start that a job was told before its first attempt is kept, to compare it with what came.
_FIRST_SAID = text(
    """
    INSERT INTO forecasts (job_id, said_at, start, start_low, start_high)
    SELECT j.id, :now, said.start, said.low, said.high
    FROM unnest(CAST(:jobs AS uuid[]), CAST(:starts AS timestamptz[]), CAST(:lows AS timestamptz[]),
                CAST(:highs AS timestamptz[])) AS said (job_id, start, low, high)
    JOIN jobs j ON j.id = said.job_id AND j.state = 'queued' AND j.attempts = 0
    ON CONFLICT (job_id) DO NOTHING
    """
)


async def upsert_holds(conn: AsyncConnection, rows: Sequence[HoldRow], *, now: datetime) -> None:
    """Write the holds of these jobs, those that are still queued."""
    if not rows:
        return
    values = {
        "now": now,
        "jobs": [row.job_id for row in rows],
        "reasons": [row.reason for row in rows],
        "messages": [row.message for row in rows],
        "unblocks": [dump_json(row.unblocks) for row in rows],
        "estimates": [row.estimated_start for row in rows],
        "kept": [dump_json(dump_seat(row.kept)) if row.kept else None for row in rows],
        "lows": [row.estimated_start_low for row in rows],
        "highs": [row.estimated_start_high for row in rows],
    }
    await conn.execute(_UPSERT, values)
    expected = [row for row in rows if row.estimated_start is not None]
    if expected:
        first = {
            "now": now,
            "jobs": [row.job_id for row in expected],
            "starts": [row.estimated_start for row in expected],
            "lows": [row.estimated_start_low for row in expected],
            "highs": [row.estimated_start_high for row in expected],
        }
        await conn.execute(_FIRST_SAID, first)


_DELETE = text(
    """
    DELETE FROM holds WHERE job_id = ANY(ARRAY(
        SELECT job_id FROM holds WHERE job_id = ANY(CAST(:ids AS uuid[])) ORDER BY job_id FOR UPDATE))
    """
)


async def delete_holds(conn: AsyncConnection, job_ids: Sequence[UUID]) -> None:
    """Forget the holds of jobs that started or ended."""
    await conn.execute(_DELETE, {"ids": list(job_ids)})


async def load_holds(conn: AsyncConnection) -> list[Row[Any]]:
    """The holds of all queued jobs."""
    query = text(
        "SELECT h.job_id, h.reason, h.message, h.unblocks, h.estimated_start,"
        " h.first_start, h.first_start_low, h.first_start_high FROM holds h"
        " JOIN jobs j ON j.id = h.job_id AND j.state = 'queued'"
    )
    return list(await conn.execute(query))
