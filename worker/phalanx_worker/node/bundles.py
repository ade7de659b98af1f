"""Code bundles on a node: fetched once by hash, verified, kept within a bound, unpacked anew for each attempt.

Owns `<data>/bundles`. What is kept is the archive as it came, so nothing that an attempt does to its files is seen by
the next. Knows no server: the fetch is passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import tarfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.threads import to_its_end
from phalanx_worker.protocol import Fill

MAX_UNPACKED_BYTES = 8 << 30
MAX_MEMBERS = 500_000
_SHA256 = re.compile(r"[0-9a-f]{64}")

Fetch = Callable[[str, str], AbstractAsyncContextManager[AsyncIterator[bytes]]]  # (sha256, attempt id) -> body


class Bundles:
    def __init__(self, directory: Path, fetch: Fetch, *, limit_bytes: int = 4 << 30):
        self._directory = directory
        self._fetch = fetch
        self._limit_bytes = limit_bytes
        self._locks: dict[str, asyncio.Lock] = {}
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for partial in directory.glob("*.part"):
            partial.unlink()
        self._size_bytes = sum(path.stat().st_size for path in directory.glob("*.tar"))

    @property
    def fill(self) -> Fill:
        """The archives."""
        return Fill(self._size_bytes, self._limit_bytes)

    async def unpack(self, sha256: str, attempt_id: str, target: Path, uid: int | None) -> None:
        """Put the bundle's files into `target`, owned by `uid`. Raises StartFailed saying what is wrong."""
        if not _SHA256.fullmatch(sha256):
            raise StartFailed(f"{sha256!r} is not a bundle's hash")
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            archive = self._directory / f"{sha256}.tar"
            if not archive.exists():
                await self._download(sha256, attempt_id, archive)
            os.utime(archive)  # most recently used
            self._evict(keep=archive)  # whether or not it can be unpacked
        given_up = threading.Event()
        try:
            await to_its_end(_extract, archive, target, uid, given_up)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise StartFailed(f"bundle {sha256[:12]} cannot be unpacked: {error}") from error

    async def _download(self, sha256: str, attempt_id: str, archive: Path) -> None:
        partial = archive.with_suffix(".part")
        digest = hashlib.sha256()
        try:
            with open(partial, "wb") as file:  # noqa: ASYNC230 - written as it arrives, 64 KiB at a time
                async with self._fetch(sha256, attempt_id) as chunks:
                    async for chunk in chunks:
                        digest.update(chunk)
                        file.write(chunk)
            if digest.hexdigest() != sha256:
                raise StartFailed(f"bundle {sha256[:12]} arrived damaged (its hash is {digest.hexdigest()[:12]})")
            partial.rename(archive)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()

    def _evict(self, *, keep: Path) -> None:
        archives = sorted(self._directory.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in archives)
        for path in archives:
            if total > self._limit_bytes and path != keep:
                total -= path.stat().st_size
                path.unlink()
        self._size_bytes = total


def _extract(archive: Path, target: Path, uid: int | None, given_up: threading.Event) -> None:
    """Unpack with the standard library's data filter: no path outside, no device, no setuid. Half of it if given up."""
    unpacked_bytes = 0
    with tarfile.open(archive) as tar:
        for count, member in enumerate(tar, start=1):
            if given_up.is_set():
                return
            unpacked_bytes += member.size
            if count > MAX_MEMBERS or unpacked_bytes > MAX_UNPACKED_BYTES:
                raise tarfile.TarError(f"more than {MAX_MEMBERS} files or {MAX_UNPACKED_BYTES} bytes")
            tar.extract(member, target, filter="data")
    if uid is not None:
        for directory, _, files in os.walk(target):
            for path in (directory, *(f"{directory}/{name}" for name in files)):
                os.lchown(path, uid, uid)
