"""`Idempotency-Key`: how a key and a body become what actions compare."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Header, Request, Response

from phalanx_server.actions.idempotency import Idempotency
from phalanx_server.api.auth import Principal

REPLAYED = "Idempotency-Replayed"

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same request sent again with the same key is answered what the first one was answered.",
    ),
]


async def idempotency_of(
    request: Request, principal: Principal, key: str | None, *, operation: str
) -> Idempotency | None:
    """The key of a request, scoped to the caller's token and to the operation; None where none was sent."""
    if key is None:
        return None
    digest = hashlib.sha256(await request.body()).digest()
    return Idempotency(f"{operation}:{principal.credential.id.hex}", key, digest)


def mark_replayed(response: Response, replayed: bool) -> None:
    """Say in the answer that it is one that was given before."""
    if replayed:
        response.headers[REPLAYED] = "true"
