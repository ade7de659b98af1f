"""Log pieces of a job as they are read and followed: rows of the index, for `store.logs.read_pieces`.

Owns the order of pieces (as they arrived) and the byte positions in what a filter selects. Refuses to open files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which pieces of a job; None = all. `attempt` is its number."""

    job_id: UUID
    rank: int | None = None
    stream: str | None = None
    attempt: int | None = None

    def clause(self) -> tuple[str, dict[str, Any]]:
        given = {"l.rank = :rank": self.rank, "l.stream = :stream": self.stream, "a.number = :attempt": self.attempt}
        used = [condition for condition, value in given.items() if value is not None]
        values = {"job_id": self.job_id, "rank": self.rank, "stream": self.stream, "attempt": self.attempt}
        kept = {name: value for name, value in values.items() if value is not None}
        return " AND ".join(["l.job_id = :job_id", *used]), kept


_COLUMNS = "l.id, l.rank, l.stream, l.url, l.url_offset, l.length_bytes, l.at, a.number AS attempt"
# By the job, too: there is no index from a number alone to an attempt, and PostgreSQL would look at all of them.
_FROM = "logs l JOIN attempts a ON a.id = l.attempt_id AND a.job_id = l.job_id"
# See store.event_views: a follower must not pass a row that an older transaction may still add.
_SETTLED = "age(l.xmin) > age(pg_snapshot_xmin(pg_current_snapshot())::xid) AS settled"


async def pieces_after(conn: AsyncConnection, wanted: LogFilter, *, after: int, limit: int) -> list[RowMapping]:
    """Pieces with ids above `after`, oldest first."""
    where, values = wanted.clause()
    query = f"SELECT {_COLUMNS}, {_SETTLED} FROM {_FROM} WHERE {where} AND l.id > :after ORDER BY l.id LIMIT :limit"
    return _mappings(await conn.execute(text(query), values | {"after": after, "limit": limit}))


async def last_pieces(conn: AsyncConnection, wanted: LogFilter, *, limit: int, limit_bytes: int) -> list[RowMapping]:
    """The newest pieces, oldest first: at most `limit`, and no more than needed for `limit_bytes`."""
    where, values = wanted.clause()
    query = f"""
        SELECT * FROM (
            SELECT newest.*, sum(length_bytes) OVER (ORDER BY id DESC) - length_bytes AS behind_bytes
            FROM (SELECT {_COLUMNS} FROM {_FROM} WHERE {where} ORDER BY l.id DESC LIMIT :limit) newest
        ) counted WHERE behind_bytes < :limit_bytes ORDER BY id
    """
    return _mappings(await conn.execute(text(query), values | {"limit": limit, "limit_bytes": limit_bytes}))


async def pieces_between(
    conn: AsyncConnection, wanted: LogFilter, *, start_bytes: int, end_bytes: int
) -> list[RowMapping]:
    """Pieces that hold bytes `[start_bytes, end_bytes)` of everything selected, each with its own `position_bytes`."""
    where, values = wanted.clause()
    query = f"""
        SELECT * FROM (
            SELECT {_COLUMNS}, sum(l.length_bytes) OVER (ORDER BY l.id) - l.length_bytes AS position_bytes
            FROM {_FROM} WHERE {where}
        ) counted WHERE position_bytes + length_bytes > :start_bytes AND position_bytes < :end_bytes ORDER BY id
    """
    return _mappings(await conn.execute(text(query), values | {"start_bytes": start_bytes, "end_bytes": end_bytes}))


async def size_of_log(conn: AsyncConnection, wanted: LogFilter) -> int:
    """Bytes that a filter selects."""
    where, values = wanted.clause()
    query = f"SELECT coalesce(sum(l.length_bytes), 0) FROM {_FROM} WHERE {where}"
    return int((await conn.execute(text(query), values)).scalar_one())


def _mappings(rows: Any) -> list[RowMapping]:
    return list(rows.mappings())
