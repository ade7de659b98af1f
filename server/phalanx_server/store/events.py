"""Events: what happened to jobs, attempts and nodes, written in the transaction that made it happen.

Owns the one way to write them. Knows no kinds and no words: those come from the domain and from the actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of `events`. `message` is a sentence for the user, `data` is for programs."""

    at: datetime
    kind: str
    message: str
    job_id: UUID | None = None
    attempt_id: UUID | None = None
    node_id: UUID | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


async def record_events(conn: AsyncConnection, rows: Sequence[Event]) -> None:
    """Insert the events in their order, in one statement."""
    if rows:
        columns = {name: [getattr(row, name) for row in rows] for name in Event.__slots__}
        columns["data"] = [dump_json(dict(row.data)) for row in rows]
        await conn.execute(_INSERT, columns)


async def record_alike(conn: AsyncConnection, job_ids: Sequence[UUID], event: Event) -> None:
    """Insert the same event for each of these jobs, in one statement."""
    if job_ids:
        values = asdict(event) | {"data": dump_json(dict(event.data)), "job_ids": list(job_ids)}
        await conn.execute(_INSERT_ALIKE, values)


_INSERT_ALIKE = text(
    """
    INSERT INTO events (at, kind, message, job_id, data)
    SELECT :at, :kind, :message, job_id, CAST(:data AS jsonb)
    FROM unnest(CAST(:job_ids AS uuid[])) WITH ORDINALITY AS row (job_id, place) ORDER BY place
    """
)


# Arrays are parsed much faster than rows of parameters; ids are given in the order of the rows.
_INSERT = text(
    """
    INSERT INTO events (at, kind, message, job_id, attempt_id, node_id, data)
    SELECT at, kind, message, job_id, attempt_id, node_id, CAST(data AS jsonb)
    FROM unnest(CAST(:at AS timestamptz[]), CAST(:kind AS text[]), CAST(:message AS text[]), CAST(:job_id AS uuid[]),
                CAST(:attempt_id AS uuid[]), CAST(:node_id AS uuid[]), CAST(:data AS text[]))
         WITH ORDINALITY AS row (at, kind, message, job_id, attempt_id, node_id, data, place)
    ORDER BY place
    """
)


_ONCE = text(
    """
    INSERT INTO events (at, kind, message, job_id, attempt_id, data)
    SELECT :at, :kind, :message, :job_id, :attempt_id, CAST(:data AS jsonb)
    WHERE (
        SELECT count(*) < :at_most AND NOT coalesce(bool_or(data @> CAST(:data AS jsonb)), false)
        FROM events WHERE job_id = :job_id AND attempt_id = :attempt_id AND kind = :kind AND data ? :topic
    )
    """
)


async def record_once(conn: AsyncConnection, event: Event, *, topic: str, at_most: int) -> None:
    """Insert an event unless its attempt has one of this kind with the same data, or `at_most` with the key `topic`."""
    values = asdict(event) | {"data": dump_json(dict(event.data)), "topic": topic, "at_most": at_most}
    del values["node_id"]
    await conn.execute(_ONCE, values)
