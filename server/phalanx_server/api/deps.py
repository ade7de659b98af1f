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

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.desired import Known
from phalanx_server.actions.submit_jobs import Submitter
from phalanx_server.api.admission import Gates
from phalanx_server.api.auth import Authenticator, Principal
from phalanx_server.api.errors import Problem, not_found
from phalanx_server.api.measures import Measures
from phalanx_server.api.what_if import WhatIf
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from phalanx_server.store.array_views import tenant_of_array
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.job_views import tenant_of_job
from phalanx_server.store.logs import LogFiles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.wakeups import Subscription, Wakeups


@dataclass
class Services:
    """One per process. `reads` is `engine` without transactions: one statement, one round trip. `links` and
    `link_reads` are the same for agents and nodes, on connections that users' requests cannot take from them."""

    settings: Settings
    engine: AsyncEngine
    reads: AsyncEngine
    links: AsyncEngine
    link_reads: AsyncEngine
    wakeups: Wakeups
    submitter: Submitter
    authenticator: Authenticator
    measures: Measures
    what_if: WhatIf
    log_files: LogFiles
    gates: Gates
    bundle_files: BundleFiles
    output_files: OutputFiles
    policy: Policy = field(default_factory=Policy)
    """Of the settings file; what is set through the API goes over it."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    desired: Known = field(default_factory=dict)
    """What agents were told last: not read again while it is the same."""

    async def wait(self, subscription: Subscription, timeout_s: float) -> None:
        """Wait for a wakeup, the time, or the end of the process: a long poll must not hold up a shutdown."""
        waits = {asyncio.ensure_future(subscription.wait(timeout_s)), asyncio.ensure_future(self.stopping.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def services_of(request: Request) -> Services:  # async: a plain function would be sent to a thread
    return request.app.state.services


Serving = Annotated[Services, Depends(services_of)]


# Who is let in though users have taken all of their own connections: those that keep it going.
FIRST = frozenset({"agent", "node", "operate"})


def caller(need: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the caller, whose role must allow `need`. 401 without a valid token, 403 without the role."""

    async def authenticated(request: Request) -> Principal:
        services: Services = request.app.state.services
        engine = services.links if need in FIRST else None
        credential = await services.authenticator.credential(request.headers.get("authorization"), engine=engine)
        principal = Principal(credential, request.scope["phalanx.request_id"])
        request.scope["phalanx.actor"] = principal.name
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


def parse_id(kind: ids.Kind, text: str) -> UUID:
    """An id from a path. What cannot be an id names nothing: Problem 404."""
    try:
        return ids.parse(kind, text)
    except ValueError as error:
        raise not_found(f"{kind} {text[:80]}") from error


async def visible_job(services: Services, principal: Principal, text: str) -> UUID:
    """The id of a job that the caller may see. Another tenant's job is a 404, like one that does not exist."""
    job_id = parse_id("job", text)
    async with services.reads.connect() as conn:
        tenant = await tenant_of_job(conn, job_id)
    if tenant is None or not principal.sees(tenant):
        raise not_found(f"job {text}")
    return job_id


async def visible_array(services: Services, principal: Principal, text: str) -> UUID:
    """The id of an array that the caller may see. Another tenant's is a 404, like one that does not exist."""
    array_id = parse_id("array", text)
    async with services.reads.connect() as conn:
        tenant = await tenant_of_array(conn, array_id)
    if tenant is None or not principal.sees(tenant):
        raise not_found(f"array {text}")
    return array_id


def narrowed(principal: Principal, tenant: str | None) -> str | None:
    """The subtree that a list shows: the one asked for, which must be within the caller's own. Problem 404 else."""
    if tenant is not None and not principal.sees(tenant):
        raise not_found(f"tenant {tenant[:200]}")
    return tenant or principal.tenant


def topic(kind: str, id: UUID) -> str:
    """The wakeup topic of one thing, for example `job:<hex>`."""
    return f"{kind}:{id.hex}"


def now() -> datetime:
    return datetime.now(UTC)
