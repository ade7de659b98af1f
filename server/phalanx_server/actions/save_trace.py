"""Take the trace that a node sends of a rank that was asked for a profile.

Owns the fencing: only of a live attempt, under its epoch, from the node that the rank is on, while it is wanted, and of
a size that is taken; looked at before the bytes and again, locked, with the row. A trace that is too large fails its
rank here, where the reason is known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.save_output import Counted, expect_whole
from phalanx_server.domain.errors import Invalid, NotFound
from phalanx_server.domain.profile import ProfileState, check_trace_size
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.profiles import (
    RankRef,
    job_of_live_rank,
    move_rank,
    new_trace_url,
    other_traces_bytes,
    save_trace,
)
from phalanx_server.store.wakeups import notify


async def save_rank_trace(
    engine: AsyncEngine,
    files: OutputFiles,
    ref: RankRef,
    body: AsyncIterator[bytes],
    *,
    sha256: str,
    size_bytes: int,
    node_id: UUID,
    now: datetime,
) -> None:
    """Store the file as the rank's trace. Sent again it takes the place of the one before. Raises NotFound where the
    node may not (any more), Invalid where the bytes are too many, or not those that were announced."""
    async with engine.connect() as conn:
        url = new_trace_url(await _expect_wanted(conn, ref, node_id))
    await _expect_room(engine, ref, size_bytes, node_id=node_id, now=now)
    counted = Counted(body)
    await files.write(url, counted.passed_on())
    kept = False
    try:
        expect_whole(counted, sha256=sha256, size_bytes=size_bytes)
        async with engine.connect() as conn:
            job_id = await _expect_wanted(conn, ref, node_id, lock=True)
            check_trace_size(size_bytes, others_bytes=await other_traces_bytes(conn, job_id, ref))
            replaced = await save_trace(conn, ref, size_bytes=size_bytes, hash=sha256, url=url, now=now)
            await notify(conn, f"job:{job_id.hex}")
            kept = True  # from here on the row may be there, whatever becomes of the commit
            await conn.commit()
    finally:
        if not kept:
            await files.discard(url)
    if replaced is not None:
        await files.discard(replaced)


async def _expect_room(engine: AsyncEngine, ref: RankRef, size_bytes: int, *, node_id: UUID, now: datetime) -> None:
    async with engine.begin() as conn:
        job_id = await _expect_wanted(conn, ref, node_id, lock=True)
        try:
            check_trace_size(size_bytes, others_bytes=await other_traces_bytes(conn, job_id, ref))
            return
        except Invalid as error:
            refused = error
        failed = {"state": ProfileState.FAILED, "reason": refused.detail}
        await move_rank(conn, ref.profile_id, ref.rank, attempt_id=ref.attempt_id, **failed, now=now)
        await notify(conn, f"job:{job_id.hex}")
    raise refused


async def _expect_wanted(conn: AsyncConnection, ref: RankRef, node_id: UUID, *, lock: bool = False) -> UUID:
    job_id = await job_of_live_rank(conn, ref, node_id=node_id, lock=lock)
    if job_id is None:
        raise NotFound("No trace of that rank is wanted: of a live attempt, under this epoch, on this node.")
    return job_id
