"""Take an output file that a node sends of a group whose ranks are done.

Owns the fencing (only a live attempt, under its epoch, from the node that the group is on; looked at before the bytes
and again, locked, with the row) and the check of what came against what was announced.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.domain.errors import Invalid, NotFound
from phalanx_server.domain.output import check_output_path
from phalanx_server.store.outputs import GroupRef, OutputFiles, OutputRow, job_of_live_group, new_output_url, save_row


@dataclass
class Counted:
    """Hashes and counts the bytes that pass through."""

    pieces: AsyncIterator[bytes]
    bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    async def passed_on(self) -> AsyncIterator[bytes]:
        async for piece in self.pieces:
            self.bytes += len(piece)
            self.digest.update(piece)
            yield piece


async def save_output(
    engine: AsyncEngine,
    files: OutputFiles,
    group: GroupRef,
    body: AsyncIterator[bytes],
    *,
    path: str,
    sha256: str,
    size_bytes: int,
    node_id: UUID,
    now: datetime,
) -> None:
    """Store the file as an output. Sent again it takes the place of the one before. Raises NotFound where the
    node may not (any more), Invalid where the bytes are not those that were announced."""
    check_output_path(path)
    async with engine.connect() as conn:
        job_id = await _expect_live(conn, group, node_id)
    row = OutputRow(
        job_id=job_id,
        attempt_id=group.attempt_id,
        group_rank=group.group_rank,
        path=path,
        bytes=size_bytes,
        hash=sha256,
        url=new_output_url(job_id, group.attempt_id, group.group_rank),
        created_at=now,
    )
    counted = Counted(body)
    await files.write(row.url, counted.passed_on())
    kept = False
    try:
        expect_whole(counted, sha256=sha256, size_bytes=size_bytes)
        async with engine.connect() as conn:
            await _expect_live(conn, group, node_id, lock=True)
            replaced = await save_row(conn, row)
            kept = True  # from here on the row may be there, whatever becomes of the commit
            await conn.commit()
    finally:
        if not kept:
            await files.discard(row.url)
    if replaced is not None:
        await files.discard(replaced)


async def _expect_live(conn: AsyncConnection, group: GroupRef, node_id: UUID, *, lock: bool = False) -> UUID:
    """The job of a group that may still leave outputs."""
    job_id = await job_of_live_group(conn, group, node_id=node_id, lock=lock)
    if job_id is None:
        raise NotFound("There is no such group of a live attempt, under this epoch, on this node.")
    return job_id


def expect_whole(counted: Counted, *, sha256: str, size_bytes: int) -> None:
    """Raises Invalid where the bytes that came are not those that were announced."""
    if counted.bytes != size_bytes:
        raise Invalid.field("", f"the body has {counted.bytes} bytes, not {size_bytes} as Content-Length says")
    if counted.digest.hexdigest() != sha256:
        raise Invalid.field("sha256", f"the body has the SHA-256 {counted.digest.hexdigest()}", "was it changed?")
