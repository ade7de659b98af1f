"""Code bundles: bytes under the storage root, named by their SHA-256; which tenant has which is in PostgreSQL.

Owns the files, reading and forgetting. A file is written once and never changed, whoever uploads it; that a tenant may
use it says its row (`jobs.insert_bundle`).
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import fsspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.deleting import delete_paths, passing_over
from phalanx_server.store.storage_threads import StorageThreads

CHUNK_BYTES = 1 << 20


class BundleFiles:
    """Files under `root`, an fsspec URL. Taking one away raises what the storage says where it refuses or is away."""

    def __init__(self, root: str) -> None:
        filesystem, base = fsspec.core.url_to_fs(root)
        self._fs: Any = filesystem
        self._root = base.rstrip("/")
        self._base = f"{self._root}/bundles"
        self._threads = StorageThreads("bundle-files")

    async def size_bytes(self, digest: str) -> int | None:
        """None where there is no such file."""
        return await self._threads.run(self._size, self._path(digest))

    async def write(self, digest: str, source: Path) -> None:
        """Store a local file, complete or not at all."""
        await self._threads.run(self._write, self._path(digest), source)

    async def set_aside(self, digest: str) -> None:
        """Take a file away, in such a way that `put_back` can undo it; nothing where there is none."""
        await self._threads.run(self._move, self._path(digest), self._aside(digest))

    async def put_back(self, digest: str) -> None:
        await self._threads.run(self._move, self._aside(digest), self._path(digest))

    async def delete_aside(self, digest: str) -> None:
        """Delete what was set aside."""
        await self._threads.run(self._delete, self._aside(digest))

    async def read(self, digest: str) -> AsyncIterator[bytes]:
        """The bytes, in pieces."""
        file = await self._threads.run(self._fs.open, self._path(digest), "rb")
        try:
            while piece := await self._threads.run(file.read, CHUNK_BYTES):
                yield piece
        finally:
            await self._threads.run(file.close)

    def _path(self, digest: str) -> str:
        return f"{self._base}/{digest[:2]}/{digest}.tar.gz"

    def _aside(self, digest: str) -> str:
        return f"{self._path(digest)}.aside"

    def _size(self, path: str) -> int | None:
        try:
            return int(self._fs.size(path))
        except FileNotFoundError:
            return None

    def _write(self, path: str, source: Path) -> None:
        if self._size(path) == source.stat().st_size:
            return
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}"
        try:
            self._fs.put_file(str(source), partial)
            self._fs.mv(partial, path)
        except Exception:
            with contextlib.suppress(Exception):  # half a file on a full disk is what keeps it full
                self._fs.rm(partial)
            raise

    def _move(self, path: str, target: str) -> None:
        with passing_over(self._fs, self._root, path):
            self._fs.mv(path, target)

    def _delete(self, path: str) -> None:
        delete_paths(self._fs, self._root, [path])


# Locked rows are in use, and passed over. One that a submit has marked as used meanwhile is looked at again and stays.
_FORGET = text(
    """
    WITH unused AS MATERIALIZED (
        SELECT b.tenant_id, b.hash FROM bundles b
        WHERE b.used_at < :before AND NOT EXISTS (
            SELECT FROM jobs j WHERE j.tenant_id = b.tenant_id AND j.bundle = b.hash
              AND (j.finished_at IS NULL OR j.finished_at >= :before))
        LIMIT :limit FOR UPDATE OF b SKIP LOCKED
    )
    DELETE FROM bundles b USING unused u WHERE b.tenant_id = u.tenant_id AND b.hash = u.hash RETURNING b.hash
    """
)
_ANYBODYS = text("SELECT DISTINCT hash FROM bundles WHERE hash = ANY(CAST(:digests AS text[]))")


async def forget_bundles(conn: AsyncConnection, *, before: datetime, limit: int) -> list[str]:
    """Delete rows of bundles that no upload or submit has used since `before`, and no job that was not over by then;
    the hash of each. `before` is well over an hour ago: so late `used_at` may be (`jobs.missing_bundles`)."""
    return list((await conn.execute(_FORGET, {"before": before, "limit": limit})).scalars())


async def bundles_of_anybody(conn: AsyncConnection, digests: Sequence[str]) -> set[str]:
    """Those of `digests` that any tenant has."""
    return set((await conn.execute(_ANYBODYS, {"digests": list(digests)})).scalars())


_OF_TENANT = text(
    "SELECT b.bytes FROM bundles b JOIN tenants t ON t.id = b.tenant_id WHERE t.path = :tenant AND b.hash = :digest"
)
_OF_ATTEMPT = text(
    """
    SELECT EXISTS (
        SELECT FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN placements p ON p.attempt_id = a.id
        WHERE a.id = :attempt_id AND a.state IN ('starting', 'running', 'stopping')
          AND p.node_id = :node_id AND p.released_at IS NULL AND j.bundle = :digest)
    """
)


async def has_bundle(conn: AsyncConnection, digest: str, *, tenant: str) -> bool:
    """Whether this tenant has uploaded it."""
    return (await conn.execute(_OF_TENANT, {"tenant": tenant, "digest": digest})).scalar_one_or_none() is not None


async def is_bundle_of_attempt(conn: AsyncConnection, digest: str, *, attempt_id: UUID, node_id: UUID) -> bool:
    """Whether a live attempt on this node runs this bundle."""
    values = {"attempt_id": attempt_id, "node_id": node_id, "digest": digest}
    return bool((await conn.execute(_OF_ATTEMPT, values)).scalar_one())
