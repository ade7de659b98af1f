"""Quotas of a tenant: what it is guaranteed of each resource, and how far it may borrow and lend."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from phalanx_server.actions.set_quotas import set_quotas
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Administering, Looking, Serving
from phalanx_server.api.etags import IfMatch, version_for
from phalanx_server.api.tenants import GivenQuota, Quota, read_tenant

router = APIRouter(tags=["tenants"])


class GivenQuotas(Given):
    """All quotas of a tenant: a resource that is not named has none any more."""

    quotas: dict[str, GivenQuota]


class Quotas(BaseModel):
    tenant: str
    quotas: dict[str, Quota]
    usage: dict[str, int]
    version: int


@router.get("/v1/quotas/{path:path}", operation_id="get_quotas")
async def get_quotas(path: str, response: Response, services: Serving, principal: Looking) -> Quotas:
    """The quotas of a tenant, and what its subtree uses. The ETag is what a change must name in If-Match."""
    tenant = await read_tenant(services, principal, path, response)
    return Quotas(tenant=tenant.path, quotas=tenant.quotas, usage=tenant.usage, version=tenant.version)


@router.put("/v1/quotas/{path:path}", operation_id="put_quotas", openapi_extra=takes(GivenQuotas))
async def put_quotas(
    path: str,
    response: Response,
    services: Serving,
    principal: Administering,
    given: Annotated[GivenQuotas, Depends(body_as(GivenQuotas))],
    if_match: IfMatch = None,
) -> Quotas:
    """Replace all quotas of a tenant. 412 `etag_mismatch` if somebody changed it in between."""
    version = await version_for(services, path, if_match)
    limits = {resource: quota.limits() for resource, quota in given.quotas.items()}
    await set_quotas(services.engine, path, limits, if_version=version, actor=principal.actor)
    return await get_quotas(path, response, services, principal)
