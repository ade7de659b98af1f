"""Changes a tenant's weight or preemption rules, if it is still as the caller saw it."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.create_tenant import preemption_of
from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import EtagMismatch, NotFound
from phalanx_server.domain.tenant import check_weight
from phalanx_server.store.audit import record_audit
from phalanx_server.store.tenants import LockedTenant, change_tenant, lock_tenant
from phalanx_server.store.wakeups import notify


async def update_tenant(
    engine: AsyncEngine,
    path: str,
    *,
    if_version: int,
    weight: float | None = None,
    preemption: Mapping[str, Any] | None = None,
    actor: Actor,
) -> int:
    """The new version; None leaves a column as it is. Raises NotFound, EtagMismatch, Invalid."""
    values: dict[str, Any] = {}
    if weight is not None:
        values["weight"] = check_weight(weight)
    if preemption is not None:
        values["preemption"] = preemption_of(preemption)
    async with engine.begin() as conn:
        tenant = await lock_version(conn, path, if_version)
        version = await change_tenant(conn, tenant.id, values)
        await record_audit(conn, actor, "update_tenant", path, values)
        await notify(conn, "queue")
        return version


async def lock_version(conn: AsyncConnection, path: str, if_version: int) -> LockedTenant:
    """The tenant, locked, if its version is this one. Raises NotFound and EtagMismatch."""
    tenant = await lock_tenant(conn, path)
    if tenant is None:
        raise NotFound(f"there is no tenant {path}")
    if tenant.version != if_version:
        raise EtagMismatch(f"tenant {path} is at version {tenant.version}, not {if_version}: read it again")
    return tenant
