"""Logs of ranks: bytes in files under the storage root, an index of them in PostgreSQL.

Owns both sides: how a batch of chunks becomes one file, how the index is written, and how bytes are read back. Files
are never appended to or changed. Storage that hangs holds up its own threads and nothing else. Refuses to know who may
write or read which attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import fsspec
from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.errors import StorageUnavailable
from phalanx_server.store.deleting import delete_paths

THREADS = 16
PATIENCE_S = 5.0
"""How long a file is waited for: a node sends its report again after 10 s, and is lost after 20 s of silence."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPiece:
    """Bytes `[start_bytes, start_bytes + len(data))` of one stream of one rank."""

    rank: int
    stream: str
    start_bytes: int
    data: bytes
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBatch:
    """The pieces of one attempt that came in one report, and the file that holds them, one after another."""

    job_id: UUID
    attempt_id: UUID
    path: str
    pieces: Sequence[LogPiece]

    def content(self) -> bytes:
        return b"".join(piece.data for piece in self.pieces)


class LogFiles:
    """Files under `root`, an fsspec URL. Paths are relative to it, so that the storage may be moved."""

    def __init__(self, root: str) -> None:
        filesystem, base = fsspec.core.url_to_fs(root)
        self._fs: Any = filesystem
        self._base = base.rstrip("/")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="log-files")
        self._given_up: set[Future[Any]] = set()

    @property
    def waiting(self) -> int:
        """Reads and writes that no thread has taken up yet."""
        return self._threads._work_queue.qsize()

    @property
    def hung(self) -> int:
        """Threads that still do what nobody waits for any more."""
        self._given_up = {work for work in self._given_up if not work.done()}
        return len(self._given_up)

    async def write(self, path: str, content: bytes) -> None:
        """Raises StorageUnavailable where the storage is full, refuses, or does not answer in time."""
        await self._in_time(lambda: self._write(self._full(path), content))

    async def read(self, path: str, *, offset: int, length: int) -> bytes:
        """FileNotFoundError once retention has taken the file. Raises StorageUnavailable."""
        return await self._in_time(
            lambda: self._fs.cat_file(self._full(path), start=offset, end=offset + length),
            passed_on=(FileNotFoundError,),
        )

    async def delete(self, paths: Sequence[str]) -> None:
        """Delete what is there of `paths`, which may name directories. Raises where the storage is away."""
        await asyncio.to_thread(self._delete, [self._full(path) for path in paths])

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    async def _in_time(self, work: Callable[[], Result], *, passed_on: tuple[type[Exception], ...] = ()) -> Result:
        """Raises StorageUnavailable for every error but those `passed_on`; at once while all threads hang, or the
        requests of all nodes would wait in vain, each for its time, and fill their gate."""
        if self.hung >= THREADS:
            raise _unavailable("does not answer")
        future = self._threads.submit(work)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.wrap_future(future)
        except passed_on:
            raise
        except TimeoutError as error:
            self._given_up.add(future)
            raise _unavailable("does not answer") from error
        except Exception as error:  # each storage has errors of its own
            raise _unavailable(f"says: {error}") from error

    def _write(self, path: str, content: bytes) -> None:
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        try:
            self._fs.pipe_file(path, content)
        except Exception:
            with contextlib.suppress(Exception):  # half a file on a full disk is what keeps it full
                self._fs.rm_file(path)
            raise

    def _delete(self, paths: Sequence[str]) -> None:
        delete_paths(self._fs, self._base, paths)


def _unavailable(why: str) -> StorageUnavailable:
    return StorageUnavailable(f"The storage of logs {why[:300]}. Try again shortly.")


def job_directory(job_id: UUID) -> str:
    """Where all log files of a job are, relative to the storage root."""
    return f"logs/{job_id.hex}"


_INSERT = text(
    """
    INSERT INTO logs (job_id, attempt_id, rank, stream, start_bytes, length_bytes, url, url_offset, at)
    SELECT :job_id, :attempt_id, rank, stream, start_bytes, length_bytes, :url, url_offset, at
    FROM unnest(CAST(:ranks AS integer[]), CAST(:streams AS text[]), CAST(:starts AS bigint[]),
                CAST(:lengths AS integer[]), CAST(:offsets AS bigint[]), CAST(:ats AS timestamptz[]))
         AS piece (rank, stream, start_bytes, length_bytes, url_offset, at)
    ON CONFLICT (attempt_id, rank, stream, start_bytes) DO NOTHING
    """
)


async def index_logs(conn: AsyncConnection, batch: LogBatch) -> None:
    """Index the pieces of a file that is already written. A piece that is known from before stays as it was."""
    offsets, end = [], 0
    for piece in batch.pieces:
        offsets.append(end)
        end += len(piece.data)
    await conn.execute(
        _INSERT,
        {
            "job_id": batch.job_id,
            "attempt_id": batch.attempt_id,
            "url": batch.path,
            "ranks": [piece.rank for piece in batch.pieces],
            "streams": [piece.stream for piece in batch.pieces],
            "starts": [piece.start_bytes for piece in batch.pieces],
            "lengths": [len(piece.data) for piece in batch.pieces],
            "offsets": offsets,
            "ats": [piece.at for piece in batch.pieces],
        },
    )


async def read_pieces(files: LogFiles, rows: Sequence[RowMapping]) -> list[bytes]:
    """The bytes of index rows, in their order; b"" for what retention has already taken. Neighbours share a read."""
    out: list[bytes] = []
    at = 0
    while at < len(rows):
        end = at + 1
        while end < len(rows) and _adjoins(rows[end - 1], rows[end]):
            end += 1
        out += await _read_run(files, rows[at:end])
        at = end
    return out


def _adjoins(first: RowMapping, second: RowMapping) -> bool:
    return first["url"] == second["url"] and first["url_offset"] + first["length_bytes"] == second["url_offset"]


async def _read_run(files: LogFiles, run: Sequence[RowMapping]) -> list[bytes]:
    start = run[0]["url_offset"]
    length = sum(row["length_bytes"] for row in run)
    try:
        content = await files.read(run[0]["url"], offset=start, length=length)
    except FileNotFoundError:
        content = b""
    return [content[row["url_offset"] - start :][: row["length_bytes"]] for row in run]
