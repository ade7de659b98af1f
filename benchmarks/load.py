"""Load over HTTP: keep-alive connections that send requests made beforehand, so that the load costs little CPU itself.

Owns just enough of HTTP/1.1 for that (answers with a Content-Length, or chunks). The same connections are used on every
contender that speaks HTTP.
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
Answer = tuple[int, bytes]


def request(method: str, path: str, *, token: str = "", document: Any = None) -> bytes:
    """One request, ready to be sent."""
    body = b"" if document is None else json.dumps(document).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json"] if body else []
    lines += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """One keep-alive connection to `http://host:port` or to `unix:PATH`."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def __aenter__(self) -> "Connection":
        if self.address.startswith("unix:"):
            opened = asyncio.open_unix_connection(self.address.removeprefix("unix:"))
        else:
            url = urlsplit(self.address)
            opened = asyncio.open_connection(url.hostname, url.port)
        self.reader, self.writer = await opened
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def send(self, message: bytes) -> Answer:
        self.writer.write(message)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await self.reader.readexactly(int(length[1])) if length else await self._chunks()
        return int(head[9:12]), body

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return body

    async def expect(self, message: bytes) -> Any:
        """The answer's JSON. RuntimeError where the status is not a 2xx."""
        status, body = await self.send(message)
        if not 200 <= status < 300:
            raise RuntimeError(
                f"{message.split(b' HTTP')[0].decode()} was answered with {status}: {body[:500].decode()}"
            )
        return json.loads(body) if body else None


@dataclass(frozen=True)
class Round:
    """What one round of load did."""

    seconds: float
    latencies_s: list[float]

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.seconds


async def drive(clients: int, seconds: float, make: Callable[[int], Awaitable[Callable[[], Awaitable[Any]]]]) -> Round:
    """`clients` that each do one thing after another for `seconds`. `make(i)` opens a client and gives what it does."""
    doing = [await make(index) for index in range(clients)]
    latencies: list[float] = []
    began = time.perf_counter()

    async def work(do: Callable[[], Awaitable[Any]]) -> None:
        while (sent := time.perf_counter()) - began < seconds:
            await do()
            latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(work(do) for do in doing))
    return Round(time.perf_counter() - began, latencies)


async def post_for(address: str, clients: int, seconds: float, messages: Callable[[int], Iterator[bytes]]) -> Round:
    """`clients` connections that each send the next of their messages as soon as the last one is answered."""
    opened: list[Connection] = []

    async def make(index: int) -> Callable[[], Awaitable[Any]]:
        connection = await Connection(address).__aenter__()
        opened.append(connection)
        stream = messages(index)
        return lambda: connection.expect(next(stream))

    try:
        return await drive(clients, seconds, make)
    finally:
        for connection in opened:
            await connection.__aexit__()
