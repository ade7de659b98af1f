"""Files as the bodies of requests and answers, a piece at a time, for both clients."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx

CHUNK_BYTES = 1 << 20


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def achunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


def receive(response: httpx.Response, target: Path) -> str:
    """Write what comes into a file; its SHA-256 in hex."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in response.iter_bytes(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


async def areceive(response: httpx.Response, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        async for chunk in response.aiter_bytes(CHUNK_BYTES):
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    return digest.hexdigest()
