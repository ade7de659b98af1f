"""The policy of the scheduler: what it may do, and how it weighs. What is set here goes over the settings file."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from phalanx_server.actions.set_policy import set_policy
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Administering, Looking, Services, Serving
from phalanx_server.api.errors import Problem
from phalanx_server.api.etags import IfMatch, etag, expected_version
from phalanx_server.store.policies import document_of, load_policy

router = APIRouter(tags=["policy"])


class GivenPolicy(Given):
    """All that is set: a field that is not named is as in the settings file of the scheduler."""

    settings: Annotated[dict[str, Any], Field(max_length=64, description="Fields of plan-format's `policy`.")]


class PolicyAnswer(BaseModel):
    policy: dict[str, Any] = Field(description="What is in force: every field.")
    settings: dict[str, Any] = Field(description="What was set here; the rest is from the settings file, or a default.")
    version: int


@router.get("/v1/policy", operation_id="get_policy")
async def get_policy(response: Response, services: Serving, principal: Looking) -> PolicyAnswer:
    """The policy that the scheduler follows. The ETag is what a change must name in If-Match."""
    return await _read(services, response)


@router.put("/v1/policy", operation_id="put_policy", openapi_extra=takes(GivenPolicy))
async def put_policy(
    response: Response,
    services: Serving,
    principal: Administering,
    given: Annotated[GivenPolicy, Depends(body_as(GivenPolicy))],
    if_match: IfMatch = None,
) -> PolicyAnswer:
    """Replace all that is set. The next pass follows it. 412 `etag_mismatch` if somebody changed it in between, 409
    while a job names a topology level that would go."""
    if if_match is None:
        raise Problem("precondition_required", "Say in If-Match which ETag the change is for.")
    version = expected_version(if_match)
    await set_policy(services.engine, given.settings, base=services.policy, if_version=version, actor=principal.actor)
    return await _read(services, response)


async def _read(services: Services, response: Response) -> PolicyAnswer:
    async with services.reads.connect() as conn:
        stored = await load_policy(conn)
    response.headers["ETag"] = etag(stored.version)
    return PolicyAnswer(
        policy=document_of(stored.over(services.policy)), settings=dict(stored.settings), version=stored.version
    )
