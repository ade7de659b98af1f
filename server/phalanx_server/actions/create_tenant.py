"""Adds a tenant to the tree, below one that exists or as a new root."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, Invalid
from phalanx_server.domain.field_errors import explain
from phalanx_server.domain.tenant import PreemptionRules, check_path, check_weight, nearest, parent_of
from phalanx_server.store.audit import record_audit
from phalanx_server.store.ids import new_id
from phalanx_server.store.tenants import all_paths, find_tenants, insert_tenant
from phalanx_server.store.wakeups import notify


@dataclass(frozen=True, slots=True)
class NewTenant:
    path: str
    weight: float = 1.0
    preemption: Mapping[str, Any] = field(default_factory=dict)


async def create_tenant(conn: AsyncConnection, tenant: NewTenant, *, actor: Actor) -> UUID:
    """The new tenant's id. Raises Invalid (path, weight, unknown parent) and Conflict (it exists)."""
    path, parent = check_path(tenant.path), parent_of(tenant.path)
    weight, preemption = check_weight(tenant.weight), preemption_of(tenant.preemption)
    found = await find_tenants(conn, [path, *([parent] if parent else [])])
    if path in found:
        raise _exists(path)
    if parent and (parent not in found or not actor.reaches(parent)):
        close = nearest(parent, [known for known in await all_paths(conn) if actor.reaches(known)])
        raise Invalid.field(
            "path", f"there is no tenant {parent!r} above it", f"did you mean {close}?" if close else None
        )
    tenant_id = new_id()
    inserted = await insert_tenant(
        conn,
        tenant_id=tenant_id,
        path=path,
        parent_id=found[parent] if parent else None,
        weight=weight,
        preemption=preemption,
    )
    if not inserted:
        raise _exists(path)
    await record_audit(conn, actor, "create_tenant", path, {"weight": weight, "preemption": preemption})
    await notify(conn, "queue")
    return tenant_id


def _exists(path: str) -> Conflict:
    return Conflict(f"tenant {path} exists already")


def preemption_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Preemption rules with what was given and nothing else: defaults stay defaults. Raises Invalid."""
    try:
        return PreemptionRules.model_validate(given).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        raise explain(error, PreemptionRules, where="preemption") from None
