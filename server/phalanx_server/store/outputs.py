"""Output files of jobs: bytes in files under the storage root, which file is what in PostgreSQL.

Owns both sides. Each upload is a file of its own under a name of ours, never changed; only its row makes it an output,
so half a file is never one. Refuses to know who may read what.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import fsspec
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.errors import StorageUnavailable
from phalanx_server.store.deleting import delete_paths
from phalanx_server.store.storage_threads import StorageThreads

CHUNK_BYTES = 1 << 20

T = TypeVar("T")


class OutputFiles:
    """Files under `root`, an fsspec URL. Paths are relative to it, so that the storage may be moved."""

    def __init__(self, root: str) -> None:
        filesystem, base = fsspec.core.url_to_fs(root)
        self._fs: Any = filesystem
        self._base = base.rstrip("/")
        self._threads = StorageThreads("output-files")

    async def write(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Store what comes, piece by piece; nothing is left of it where that fails. Raises StorageUnavailable where the
        storage is full or away."""
        try:
            file = await _stored(self._threads, self._create, self._full(path))
            try:
                async for piece in _gathered(pieces):
                    await _stored(self._threads, file.write, piece)
            finally:
                await _stored(self._threads, file.close)
        except BaseException:
            await self.discard(path)
            raise

    async def size_bytes(self, path: str) -> int | None:
        """None where there is no such file."""
        with contextlib.suppress(FileNotFoundError):
            return int(await self._threads.run(self._fs.size, self._full(path)))
        return None

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """The bytes, in pieces."""
        file = await self._threads.run(self._fs.open, self._full(path), "rb")
        try:
            while piece := await self._threads.run(file.read, CHUNK_BYTES):
                yield piece
        finally:
            await self._threads.run(file.close)

    async def delete(self, paths: Iterable[str]) -> None:
        """Delete what is there of `paths`, which may name directories. Raises where the storage is away."""
        await self._threads.run(self._delete, [self._full(path) for path in paths])

    async def discard(self, path: str) -> None:
        """Delete a file that nothing names. Where that fails it stays: what the caller has to say matters more."""
        with contextlib.suppress(Exception):
            await asyncio.shield(self.delete([path]))

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _create(self, path: str) -> Any:
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        return self._fs.open(path, "wb")

    def _delete(self, paths: list[str]) -> None:
        delete_paths(self._fs, self._base, paths)


async def _stored(threads: StorageThreads, work: Callable[..., T], *args: Any) -> T:
    try:
        return await threads.run(work, *args)
    except Exception as error:  # each storage has errors of its own
        raise StorageUnavailable(f"The storage of outputs says: {str(error)[:300]}. Try again shortly.") from error


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a hop into a thread."""
    waiting = bytearray()
    async for piece in pieces:
        waiting += piece
        if len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


def output_directory(job_id: UUID) -> str:
    """Where all output files of a job are, relative to the storage root."""
    return f"outputs/{job_id.hex}"


def new_output_url(job_id: UUID, attempt_id: UUID, group_rank: int) -> str:
    """A name for one upload. It is nothing of the user's: their names need not be the storage's."""
    return f"{output_directory(job_id)}/{attempt_id.hex}/{group_rank}/{uuid.uuid4().hex}"


# ------------------------------------------------------------------ written


@dataclass(frozen=True, slots=True)
class GroupRef:
    """One group of an attempt, as a node names it."""

    attempt_id: UUID
    epoch: int
    group_rank: int


_LIVE_GROUP = """
SELECT a.job_id FROM attempts a JOIN placements p ON p.attempt_id = a.id
WHERE a.id = :attempt_id AND a.epoch = :epoch AND a.state IN ('starting', 'running', 'stopping')
  AND p.node_id = :node_id AND p.group_rank = :group_rank AND p.released_at IS NULL
"""


async def job_of_live_group(
    conn: AsyncConnection, group: GroupRef, *, node_id: UUID, lock: bool = False
) -> UUID | None:
    """The job of a live attempt that has this group on this node; locked, it does not end meanwhile."""
    query = text(_LIVE_GROUP + (" FOR NO KEY UPDATE OF a" if lock else ""))
    return (await conn.execute(query, asdict(group) | {"node_id": node_id})).scalar_one_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRow:
    job_id: UUID
    attempt_id: UUID
    group_rank: int
    path: str
    bytes: int
    hash: str
    url: str
    created_at: datetime


_SAVE = text(
    """
    WITH before AS (
        SELECT url FROM outputs WHERE attempt_id = :attempt_id AND group_rank = :group_rank AND path = :path
    )
    INSERT INTO outputs (job_id, attempt_id, group_rank, path, bytes, hash, url, created_at)
    VALUES (:job_id, :attempt_id, :group_rank, :path, :bytes, :hash, :url, :created_at)
    ON CONFLICT (attempt_id, group_rank, path) DO UPDATE SET
        bytes = EXCLUDED.bytes, hash = EXCLUDED.hash, url = EXCLUDED.url, created_at = EXCLUDED.created_at
    RETURNING (SELECT url FROM before) AS replaced
    """
)


async def save_row(conn: AsyncConnection, row: OutputRow) -> str | None:
    """Make a stored file an output of its attempt, which the caller has locked; the file that it replaces, if any."""
    return (await conn.execute(_SAVE, asdict(row))).scalar_one()


# ------------------------------------------------------------------ looked at

_NEWEST = """
NOT EXISTS (SELECT FROM outputs later JOIN attempts b ON b.id = later.attempt_id
            WHERE later.job_id = o.job_id AND later.path = o.path AND b.number > a.number)
"""
_SELECT = """
SELECT o.path, o.group_rank, o.bytes, o.hash, o.url, o.created_at, a.number AS attempt
FROM outputs o JOIN attempts a ON a.id = o.attempt_id
WHERE o.job_id = :job_id AND (a.number = :attempt OR CAST(:attempt AS integer) IS NULL AND {newest})
"""
_LIST = text(
    _SELECT.format(newest=_NEWEST)
    + " AND (o.path, o.group_rank) > (:after_path, :after_group) ORDER BY o.path, o.group_rank LIMIT :limit"
)
_ONE = text(
    _SELECT.format(newest="true")
    + " AND o.path = :path AND (o.group_rank = :group_rank OR CAST(:group_rank AS integer) IS NULL)"
    " ORDER BY a.number DESC, o.group_rank LIMIT 1"
)


async def list_outputs(
    conn: AsyncConnection, job_id: UUID, *, attempt: int | None, after: tuple[str, int], limit: int
) -> list[Row[Any]]:
    """At most `limit` outputs by path and group: of one attempt, or each of the newest attempt that left that path."""
    values = {"job_id": job_id, "attempt": attempt, "after_path": after[0], "after_group": after[1], "limit": limit}
    return list(await conn.execute(_LIST, values))


async def find_output(
    conn: AsyncConnection, job_id: UUID, path: str, *, attempt: int | None, group_rank: int | None
) -> Row[Any] | None:
    """One output: of the newest attempt and the lowest group that left it, unless said otherwise."""
    values = {"job_id": job_id, "path": path, "attempt": attempt, "group_rank": group_rank}
    return (await conn.execute(_ONE, values)).one_or_none()
