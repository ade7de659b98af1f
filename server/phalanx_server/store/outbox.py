"""The outbox: notices for the world outside, written in the transaction that they are about, delivered later.

Owns the rows: who is due, who was delivered, when to try again. Knows no HTTP. Delivery is at least once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.job import JobState
from phalanx_server.store import ids
from phalanx_server.store.schema import outbox


@dataclass(frozen=True, slots=True)
class Notice:
    topic: str
    payload: Mapping[str, Any]


def state_notice(
    job_id: UUID, *, name: str, tenant: str, state: JobState, attempt: int, message: str, now: datetime
) -> Notice:
    """That a job has entered a state."""
    payload = {
        "job_id": ids.encode("job", job_id),
        "name": name,
        "tenant": tenant,
        "state": state.value,
        "attempt": attempt,
        "message": message,
        "at": now.isoformat().replace("+00:00", "Z"),
    }
    return Notice(f"job.{state.value}", payload)


_DUE = text(
    """
    SELECT id, topic, payload, created_at, tries FROM outbox WHERE delivered_at IS NULL AND due_at <= :now
    ORDER BY due_at, id LIMIT :limit
    """
)
_DELIVERED = text("UPDATE outbox SET delivered_at = :now, tries = tries + 1, last_error = NULL WHERE id = ANY(:ids)")
_FAILED = text(
    """
    UPDATE outbox SET tries = tries + 1, due_at = :due_at, last_error = :error,
                      delivered_at = CASE WHEN :give_up THEN CAST(:now AS timestamptz) END
    WHERE id = :id AND delivered_at IS NULL
    """
)
_SKIP_ALL = text("UPDATE outbox SET delivered_at = :now WHERE delivered_at IS NULL AND due_at <= :now")


async def post_notices(conn: AsyncConnection, notices: Sequence[Notice], *, now: datetime) -> None:
    """Put notices into the outbox, due at once."""
    if notices:
        rows = [{"topic": n.topic, "payload": dict(n.payload), "created_at": now, "due_at": now} for n in notices]
        await conn.execute(insert(outbox), rows)


async def due_notices(conn: AsyncConnection, *, now: datetime, limit: int) -> list[Row[Any]]:
    """Undelivered notices whose time has come, oldest first."""
    return list(await conn.execute(_DUE, {"now": now, "limit": limit}))


async def mark_delivered(conn: AsyncConnection, ids: Sequence[int], *, now: datetime) -> None:
    await conn.execute(_DELIVERED, {"ids": list(ids), "now": now})


async def mark_failed(
    conn: AsyncConnection, notice_id: int, *, error: str, due_at: datetime, now: datetime, give_up: bool
) -> None:
    """Note why it failed, and try again at `due_at`, unless nobody shall any more. One that was delivered meanwhile
    stays delivered."""
    values = {"id": notice_id, "error": error, "due_at": due_at, "now": now, "give_up": give_up}
    await conn.execute(_FAILED, values)


async def skip_due_notices(conn: AsyncConnection, *, now: datetime) -> int:
    """Where nobody wants them: count all that are due as delivered."""
    return (await conn.execute(_SKIP_ALL, {"now": now})).rowcount


async def count_undelivered(conn: AsyncConnection) -> int:
    return (await conn.execute(text("SELECT count(*) FROM outbox WHERE delivered_at IS NULL"))).scalar_one()
