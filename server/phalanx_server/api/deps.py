"""What routes are given: the services of the process, the caller, and parsed ids.

Owns the dependencies that more than one resource uses. Refuses to hold state: `main` builds `Services`, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.submit_jobs import Submitter
from phalanx_server.api.auth import Authenticator, Principal
from phalanx_server.api.errors import Problem, not_found
from phalanx_server.api.measures import Measures
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store.wakeups import Subscription, Wakeups


@dataclass
class Services:
    """One per process. `reads` is `engine` without transactions: one statement, one round trip."""

    settings: Settings
    engine: AsyncEngine
    reads: AsyncEngine
    wakeups: Wakeups
    submitter: Submitter
    authenticator: Authenticator
    measures: Measures
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, subscription: Subscription, timeout_s: float) -> None:
        """Wait for a wakeup, the time, or the end of the process: a long poll must not hold up a shutdown."""
        waits = {asyncio.ensure_future(subscription.wait(timeout_s)), asyncio.ensure_future(self.stopping.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


def services_of(request: Request) -> Services:
    return request.app.state.services


Serving = Annotated[Services, Depends(services_of)]


def caller(need: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the caller, whose role must allow `need`. 401 without a valid token, 403 without the role."""

    async def authenticated(request: Request) -> Principal:
        services: Services = request.app.state.services
        principal = await services.authenticator.principal(request.headers.get("authorization"))
        request.scope["phalanx.actor"] = principal.actor
        if not principal.may(need):
            raise Problem("forbidden", f"A token with the role {principal.role} may not do this.")
        return principal

    return authenticated


Looking = Annotated[Principal, Depends(caller("look"))]
Submitting = Annotated[Principal, Depends(caller("submit"))]
Steering = Annotated[Principal, Depends(caller("steer"))]
Operating = Annotated[Principal, Depends(caller("operate"))]
Managing = Annotated[Principal, Depends(caller("manage"))]
Administering = Annotated[Principal, Depends(caller("administer"))]
Agent = Annotated[Principal, Depends(caller("agent"))]
NodeRunner = Annotated[Principal, Depends(caller("node"))]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Sending the same request again with the same key answers what the first one was answered.",
    ),
]


def parse_id(kind: ids.Kind, text: str) -> UUID:
    """An id from a path. What cannot be an id names nothing: Problem 404."""
    try:
        return ids.parse(kind, text)
    except ValueError as error:
        raise not_found(f"{kind} {text[:80]}") from error


def now() -> datetime:
    return datetime.now(UTC)
