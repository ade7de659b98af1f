"""Bodies of transfers whose other end has gone silent.

Owns how long a peer may send or take nothing. Uvicorn waits for ever: a node that lost its power in the middle of an
upload, or a reader that stopped reading, would keep its place among the transfers, and 32 of them would be all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from phalanx_server.api.errors import Problem

STALLED_S = 60.0


async def body_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises Problem 408 where nothing does for STALLED_S."""
    pieces = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(STALLED_S):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            detail = f"Nothing of the body has come for {STALLED_S:.0f} s."
            raise Problem("invalid_request", detail, status=408, headers={"connection": "close"}) from None
        yield piece


class Sent(StreamingResponse):
    """Cut off where the other end takes nothing for STALLED_S. (The framework treats what `send` raises then, an
    OSError, as a client that has gone.)"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patiently(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        await super().__call__(scope, receive, patiently)
