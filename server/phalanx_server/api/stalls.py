"""Bodies whose other end has gone silent.

Owns how long a peer may send or take nothing. Uvicorn waits for ever: a node that lost its power in the middle of a
report or an upload, or a reader that stopped reading, would keep its place at its gate, and few of them would be all.
"""

from __future__ import annotations

import asyncio

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from phalanx_server.api.errors import Problem

STALLED_S = 60.0


def not_for_ever(receive: Receive) -> Receive:
    """`receive`, raising Problem 408 where nothing of the body has come for STALLED_S."""
    whole = False

    async def receive_in_time() -> Message:
        nonlocal whole
        if whole:
            return await receive()  # which tells when the client goes
        try:
            async with asyncio.timeout(STALLED_S):
                message = await receive()
        except TimeoutError:
            detail = f"Nothing of the body has come for {STALLED_S:.0f} s."
            raise Problem("invalid_request", detail, status=408, headers={"connection": "close"}) from None
        whole = not message.get("more_body", False)
        return message

    return receive_in_time


class Sent(StreamingResponse):
    """Cut off where the other end takes nothing for STALLED_S. (The framework treats what `send` raises then, an
    OSError, as a client that has gone.)"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patiently(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        await super().__call__(scope, receive, patiently)
