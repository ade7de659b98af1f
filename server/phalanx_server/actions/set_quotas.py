"""Gives a tenant its quotas, all of them at once, if it is still as the caller saw it."""

from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.update_tenant import lock_version
from phalanx_server.domain.access import Actor
from phalanx_server.domain.tenant import QuotaLimits, check_quotas
from phalanx_server.store.audit import record_audit
from phalanx_server.store.tenants import LockedTenant, lock_tenant, replace_quotas
from phalanx_server.store.wakeups import notify


async def set_quotas(
    engine: AsyncEngine, path: str, quotas: Mapping[str, QuotaLimits], *, if_version: int, actor: Actor
) -> int:
    """The tenant's new version. Resources that are not named have no quota any more. Raises NotFound, EtagMismatch,
    Invalid."""
    check_quotas(quotas)
    async with engine.begin() as conn:
        return await _replace(conn, path, await lock_version(conn, path, if_version), quotas, actor)


async def give_quotas(conn: AsyncConnection, path: str, quotas: Mapping[str, QuotaLimits], *, actor: Actor) -> None:
    """Give a tenant its first quotas, in the transaction that creates it. Raises Invalid."""
    check_quotas(quotas)
    tenant = await lock_tenant(conn, path)
    if quotas and tenant is not None:
        await _replace(conn, path, tenant, quotas, actor)


async def _replace(
    conn: AsyncConnection, path: str, tenant: LockedTenant, quotas: Mapping[str, QuotaLimits], actor: Actor
) -> int:
    version = await replace_quotas(conn, tenant, quotas)
    await record_audit(conn, actor, "set_quotas", path, {name: asdict(each) for name, each in quotas.items()})
    await notify(conn, "queue")
    return version
