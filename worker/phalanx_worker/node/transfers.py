"""What goes beside the reports on the runner's line to the server: code bundles come down, output files and traces go
up.

Owns these two requests. Knows neither when they are made nor what is tried again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from urllib.parse import quote

import httpx

from phalanx_worker.node.answers import Delivery, refusal
from phalanx_worker.node.link import Link
from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.outputs import CHUNK_BYTES
from phalanx_worker.node.threads import to_its_end

_TIMEOUT_S = 60.0
_NOT_LIVE = 404


@dataclass(frozen=True)
class OutputRef:
    """Which file of which group it is, for the server."""

    attempt_id: str
    epoch: int
    group_rank: int
    path: str
    sha256: str
    bytes: int

    @property
    def url(self) -> str:
        return f"/v1/node/attempts/{self.attempt_id}/outputs/{quote(self.path)}"

    @property
    def params(self) -> dict[str, str | int]:
        return {"epoch": self.epoch, "group_rank": self.group_rank, "sha256": self.sha256}


@dataclass(frozen=True)
class ProfileRef:
    """Which rank's trace of which profile it is."""

    attempt_id: str
    epoch: int
    profile_id: str
    rank: int
    sha256: str
    bytes: int

    @property
    def url(self) -> str:
        return f"/v1/node/attempts/{self.attempt_id}/profiles/{self.profile_id}/ranks/{self.rank}"

    @property
    def params(self) -> dict[str, str | int]:
        return {"epoch": self.epoch, "sha256": self.sha256}


class NotLive(Exception):
    """The server takes no outputs of this attempt (any more)."""


class CutOff(Exception):
    """The connection broke off. A server that refuses a large file without reading it hangs up, and its answer is lost
    then: it may have been overloaded, or the file be larger than it takes."""


class Transfers:
    def __init__(self, link: Link):
        self.link = link
        self.waiting_bytes = 0
        """Of output files that are neither delivered nor given up."""

    @contextlib.asynccontextmanager
    async def fetch_bundle(self, sha256: str, attempt_id: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """The bundle's bytes. Raises StartFailed when the server cannot be asked or says no."""
        if self.link.client is None:
            raise StartFailed("the runner has no server to fetch the bundle from yet")
        url = f"/v1/node/bundles/{sha256}"
        try:
            async with self.link.client.stream(
                "GET",
                url,
                params={"attempt_id": attempt_id},
                headers={"Accept-Encoding": "identity"},
                timeout=_TIMEOUT_S,
            ) as answer:
                if answer.status_code != 200:
                    raise StartFailed(f"the server does not give bundle {sha256[:12]}: HTTP {answer.status_code}")
                yield answer.aiter_bytes()
        except httpx.HTTPError as error:
            raise StartFailed(f"bundle {sha256[:12]} could not be fetched: {error!r}") from error

    async def put_file(self, ref: OutputRef | ProfileRef, descriptor: int) -> Delivery:
        """Send the file that is open as `descriptor`. FAULT also where no answer came in time. Raises NotLive, CutOff,
        and OSError where the file has become shorter."""
        if self.link.client is None:
            return Delivery.FAULT
        try:
            answer = await self.link.client.put(
                ref.url,
                params=ref.params,
                content=_pieces(descriptor, ref.bytes),
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(ref.bytes)},
                timeout=_TIMEOUT_S,
            )
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise CutOff from error
        except (httpx.HTTPError, RuntimeError):  # the latter where the client was closed for another server's
            return Delivery.FAULT
        if answer.is_success:
            return Delivery.TAKEN
        refused = refusal(answer)
        if refused is Delivery.REJECTED and answer.status_code == _NOT_LIVE:
            raise NotLive
        return refused


async def _pieces(descriptor: int, size_bytes: int) -> AsyncIterator[bytes]:
    at = 0
    while at < size_bytes:
        piece = await to_its_end(os.pread, descriptor, min(CHUNK_BYTES, size_bytes - at), at)
        if not piece:
            raise OSError("the file has become shorter")
        at += len(piece)
        yield piece
