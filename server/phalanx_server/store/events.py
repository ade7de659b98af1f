"""Events: what happened to jobs, attempts and nodes, written in the transaction that made it happen.

Owns the one way to write them. Knows no kinds and no words: those come from the domain and from the actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import events


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
    """Insert the events in their order."""
    if rows:
        await conn.execute(insert(events), [asdict(row) for row in rows])
