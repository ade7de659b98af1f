"""Tenants: the tree, who may evict whom, and what each subtree uses."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions import create_tenant as creation
from phalanx_server.actions.idempotency import once
from phalanx_server.actions.set_quotas import give_quotas
from phalanx_server.actions.update_tenant import update_tenant
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Administering, Looking, Managing, Services, Serving
from phalanx_server.api.errors import Problem, not_found
from phalanx_server.api.etags import IfMatch, etag, version_for
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.tenant import WEIGHT_MAX, PreemptionRules, QuotaLimits
from phalanx_server.store import ids
from phalanx_server.store.tenant_views import list_tenants, load_tenant

router = APIRouter(tags=["tenants"])

WEIGHT_DEFAULT = 1.0
Weight = Annotated[
    float, Field(ge=0, le=WEIGHT_MAX, description="Share of what is borrowable; 0 = loses it to anybody.")
]


class Quota(BaseModel):
    """Of one GPU type, or of `cpu` or `memory_gib`. A limit of null = no limit."""

    nominal: int
    borrowing_limit: int | None = None
    lending_limit: int | None = None


class GivenQuota(Given):
    """`nominal` is guaranteed; at most `borrowing_limit` more may be borrowed, `lending_limit` of it lent."""

    nominal: Annotated[int, Field(ge=0, strict=True)]
    borrowing_limit: Annotated[int, Field(ge=0, strict=True)] | None = None
    lending_limit: Annotated[int, Field(ge=0, strict=True)] | None = None

    def limits(self) -> QuotaLimits:
        return QuotaLimits(self.nominal, self.borrowing_limit, self.lending_limit)


class NewTenant(Given):
    """`path` names the tenant below its parent, which must exist: `research/nlp` below `research`."""

    path: Annotated[str, Field(min_length=1, max_length=256)]
    weight: Weight = WEIGHT_DEFAULT
    preemption: PreemptionRules = PreemptionRules()
    quotas: dict[str, GivenQuota] = Field(default_factory=dict)

    def limits(self) -> dict[str, QuotaLimits]:
        return {resource: quota.limits() for resource, quota in self.quotas.items()}


class TenantChange(Given):
    """What is absent stays as it is."""

    weight: Weight | None = None
    preemption: PreemptionRules | None = None


class Tenant(BaseModel):
    id: str
    path: str
    parent: str | None
    weight: float
    preemption: dict[str, Any]
    quotas: dict[str, Quota]
    usage: dict[str, int] = Field(
        description="What the tenant and all below it use: GPUs by type, `cpu`, `memory_gib`."
    )
    version: int


@router.get("/v1/tenants", operation_id="list_tenants")
async def list_all_tenants(
    services: Serving, principal: Looking, limit: Limit = 500, cursor: CursorText = None
) -> Page[Tenant]:
    """The tenants that the caller may see, by path: parents come before their children."""
    after = decode_cursor(cursor, (str,))[0] if cursor else None
    async with services.reads.connect() as conn:
        rows = await list_tenants(conn, tenant=principal.tenant, after=after, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].path) if len(rows) > limit else None
    return Page(items=[_document(row) for row in page], next_cursor=more)


@router.post("/v1/tenants", operation_id="create_tenant", status_code=201, openapi_extra=takes(NewTenant))
async def create_tenant(
    request: Request,
    response: Response,
    services: Serving,
    principal: Managing,
    given: Annotated[NewTenant, Depends(body_as(NewTenant))],
    idempotency_key: IdempotencyKey = None,
) -> Tenant:
    """Create a tenant below one that exists, or as a new root. A manager may below their own, without
    quotas and with the default weight and preemption rules."""
    _check_reach(principal, given)

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        wanted = creation.NewTenant(given.path, given.weight, given.preemption.model_dump(exclude_unset=True))
        await creation.create_tenant(conn, wanted, actor=principal.actor)
        await give_quotas(conn, given.path, given.limits(), actor=principal.actor)
        return _document(await load_tenant(conn, given.path)).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation="create_tenant")
    done = await once(services.engine, key, work)
    mark_replayed(response, done.replayed)
    response.headers["ETag"] = etag(done.response["version"])
    return Tenant.model_validate(done.response)


def _check_reach(principal: Principal, given: NewTenant) -> None:
    if principal.tenant is not None and given.path != principal.tenant and not principal.sees(given.path):
        raise Problem(
            "forbidden", f"{given.path} is not below {principal.tenant}, which is as far as the token reaches."
        )
    if principal.may("administer"):
        return
    usual = {"quotas": {}, "weight": WEIGHT_DEFAULT, "preemption": PreemptionRules()}
    reserved = [name for name, value in usual.items() if getattr(given, name) != value]
    if reserved:
        raise Problem("forbidden", f"Only an admin may give {' and '.join(reserved)}: leave it out, or ask an admin.")


@router.get("/v1/tenants/{path:path}", operation_id="get_tenant")
async def get_tenant(path: str, response: Response, services: Serving, principal: Looking) -> Tenant:
    """One tenant with its quotas and what its subtree uses."""
    return await read_tenant(services, principal, path, response)


@router.patch("/v1/tenants/{path:path}", operation_id="change_tenant", openapi_extra=takes(TenantChange))
async def change_tenant(
    path: str,
    response: Response,
    services: Serving,
    principal: Administering,
    given: Annotated[TenantChange, Depends(body_as(TenantChange))],
    if_match: IfMatch = None,
) -> Tenant:
    """Change weight or preemption rules. If-Match names the version that the change is for."""
    version = await version_for(services, path, if_match)
    rules = given.preemption.model_dump(exclude_unset=True) if given.preemption else None
    await update_tenant(
        services.engine, path, if_version=version, weight=given.weight, preemption=rules, actor=principal.actor
    )
    return await read_tenant(services, principal, path, response)


async def read_tenant(services: Services, principal: Principal, path: str, response: Response) -> Tenant:
    """The tenant as a document, and its version as the ETag. Problem 404 for one that the caller may not see."""
    async with services.reads.connect() as conn:
        row = await load_tenant(conn, path) if principal.sees(path) else None
    if row is None:
        raise not_found(f"tenant {path[:200]}")
    response.headers["ETag"] = etag(row.version)
    return _document(row)


def _document(row: Row[Any] | None) -> Tenant:
    assert row is not None
    shown = {name: row._mapping[name] for name in Tenant.model_fields if name != "id"}
    return Tenant(**shown, id=ids.encode("tenant", row.id))
