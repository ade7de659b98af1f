"""Profiles of running jobs: who asked for which ranks, how far each is, and where its trace lies.

Owns the SQL. The files are `store.outputs.OutputFiles`, each under a name of ours; only a row makes one a trace.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import profile_ranks, profiles


def profile_directory(job_id: UUID) -> str:
    """Where all traces of a job are, relative to the storage root."""
    return f"profiles/{job_id.hex}"


def new_trace_url(job_id: UUID) -> str:
    """A name for one upload."""
    return f"{profile_directory(job_id)}/{uuid.uuid4().hex}"


# ------------------------------------------------------------------ asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class NewProfile:
    id: UUID
    job_id: UUID
    attempt_id: UUID
    steps: int
    created_by: str
    created_at: datetime


async def create_profile(conn: AsyncConnection, profile: NewProfile, ranks: Sequence[int]) -> None:
    """Of a live attempt, which the caller has locked and which has none that is open."""
    await conn.execute(insert(profiles).values(**asdict(profile)))
    await conn.execute(insert(profile_ranks), [{"profile_id": profile.id, "rank": rank} for rank in ranks])


# ------------------------------------------------------------------ heard of

_CLOSE = """
UPDATE profiles p SET closed_at = :now WHERE id = :profile_id AND closed_at IS NULL AND NOT EXISTS (
    SELECT FROM profile_ranks r WHERE r.profile_id = p.id AND r.state IN ('requested', 'recording'))
"""
_MOVE = text(
    """
    UPDATE profile_ranks r SET state = :state, reason = :reason FROM profiles p
    WHERE p.id = r.profile_id AND p.id = :profile_id AND p.attempt_id = :attempt_id AND r.rank = :rank
      AND r.state IN ('requested', 'recording')
    """
)


async def move_rank(
    conn: AsyncConnection, profile_id: UUID, rank: int, *, attempt_id: UUID, state: str, reason: str, now: datetime
) -> None:
    """Of an attempt that the caller has locked; what is not asked of it, or is over, stays as it is."""
    values = {"profile_id": profile_id, "rank": rank, "attempt_id": attempt_id, "state": state, "reason": reason}
    await conn.execute(_MOVE, values)
    await close_if_done(conn, profile_id, now=now)


async def close_if_done(conn: AsyncConnection, profile_id: UUID, *, now: datetime) -> None:
    """Close a profile, whose attempt the caller has locked, if nothing more is to come."""
    await conn.execute(text(_CLOSE), {"profile_id": profile_id, "now": now})


async def close(conn: AsyncConnection, profile_id: UUID, *, reason: str, now: datetime) -> None:
    """Give up what is open of it."""
    await conn.execute(
        text(
            "UPDATE profile_ranks SET state = 'failed', reason = :reason"
            " WHERE profile_id = :profile_id AND state IN ('requested', 'recording')"
        ),
        {"profile_id": profile_id, "reason": reason},
    )
    await close_if_done(conn, profile_id, now=now)


@dataclass(frozen=True, slots=True)
class RankRef:
    """One rank of a profile of an attempt, as a node names it."""

    attempt_id: UUID
    epoch: int
    profile_id: UUID
    rank: int


_LIVE_RANK = """
SELECT a.job_id FROM attempts a JOIN placements p ON p.attempt_id = a.id
JOIN profiles f ON f.attempt_id = a.id JOIN profile_ranks r ON r.profile_id = f.id
WHERE a.id = :attempt_id AND a.epoch = :epoch AND a.state IN ('starting', 'running', 'stopping')
  AND p.node_id = :node_id AND p.released_at IS NULL AND :rank BETWEEN p.first_rank AND p.first_rank + p.ranks - 1
  AND f.id = :profile_id AND r.rank = :rank AND r.state <> 'failed'
"""


async def job_of_live_rank(conn: AsyncConnection, ref: RankRef, *, node_id: UUID, lock: bool = False) -> UUID | None:
    """The job of a live attempt that has this rank on this node, and of which this profile is wanted; locked, it does
    not end meanwhile."""
    query = text(_LIVE_RANK + (" FOR NO KEY UPDATE OF a" if lock else ""))
    return (await conn.execute(query, asdict(ref) | {"node_id": node_id})).scalar_one_or_none()


_OTHER_TRACES = text(
    """
    SELECT coalesce(sum(r.bytes), 0) FROM profile_ranks r JOIN profiles p ON p.id = r.profile_id
    WHERE p.job_id = :job_id AND r.state = 'ready' AND NOT (p.id = :profile_id AND r.rank = :rank)
    """
)


async def other_traces_bytes(conn: AsyncConnection, job_id: UUID, ref: RankRef) -> int:
    """Of all traces of a job but that of `ref`, which a new one would replace."""
    values = {"job_id": job_id, "profile_id": ref.profile_id, "rank": ref.rank}
    return int((await conn.execute(_OTHER_TRACES, values)).scalar_one())


_SAVE = text(
    """
    WITH before AS (SELECT url FROM profile_ranks WHERE profile_id = :profile_id AND rank = :rank)
    UPDATE profile_ranks SET state = 'ready', reason = '', bytes = :bytes, hash = :hash, url = :url
    WHERE profile_id = :profile_id AND rank = :rank
    RETURNING (SELECT url FROM before) AS replaced
    """
)


async def save_trace(
    conn: AsyncConnection, ref: RankRef, *, size_bytes: int, hash: str, url: str, now: datetime
) -> str | None:
    """Make a stored file the trace of a rank whose attempt the caller has locked; the file that it replaces, if any."""
    values = {"profile_id": ref.profile_id, "rank": ref.rank, "bytes": size_bytes, "hash": hash, "url": url}
    replaced = (await conn.execute(_SAVE, values)).scalar_one()
    await close_if_done(conn, ref.profile_id, now=now)
    return replaced


# ------------------------------------------------------------------ looked at

_VIEW = """
SELECT p.id, p.job_id, p.steps, p.created_by, p.created_at, p.closed_at, a.id AS attempt_id, a.number AS attempt,
       a.state IN ('starting', 'running', 'stopping') AS live, (
           SELECT jsonb_agg(jsonb_build_object('rank', r.rank, 'state', r.state, 'reason', r.reason, 'bytes', r.bytes,
                                               'sha256', r.hash) ORDER BY r.rank)
           FROM profile_ranks r WHERE r.profile_id = p.id) AS ranks
FROM profiles p JOIN attempts a ON a.id = p.attempt_id
WHERE p.job_id = :job_id
"""


async def list_profiles(conn: AsyncConnection, job_id: UUID) -> list[Row[Any]]:
    """Those of a job, newest first. A job has few."""
    return list(await conn.execute(text(_VIEW + " ORDER BY p.id DESC"), {"job_id": job_id}))


async def load_profile(conn: AsyncConnection, job_id: UUID, profile_id: UUID) -> Row[Any] | None:
    query = text(_VIEW + " AND p.id = :profile_id")
    return (await conn.execute(query, {"job_id": job_id, "profile_id": profile_id})).one_or_none()


_TRACE = text(
    """
    SELECT r.bytes, r.hash, r.url FROM profile_ranks r JOIN profiles p ON p.id = r.profile_id
    WHERE p.job_id = :job_id AND p.id = :profile_id AND r.rank = :rank AND r.state = 'ready'
    """
)


async def find_trace(conn: AsyncConnection, job_id: UUID, profile_id: UUID, rank: int) -> Row[Any] | None:
    """Where the trace of a rank lies, once it is there."""
    values = {"job_id": job_id, "profile_id": profile_id, "rank": rank}
    return (await conn.execute(_TRACE, values)).one_or_none()
