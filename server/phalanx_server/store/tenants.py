"""Tenants and quotas, as they are changed.

Owns the write side: find, lock, insert, change. `tenant_views` looks at them. A tenant's version moves by one with each
change of its own columns or of its quotas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.tenant import QuotaLimits
from phalanx_server.store.schema import quotas, tenants


@dataclass(frozen=True, slots=True)
class LockedTenant:
    id: UUID
    version: int


async def lock_tenant(conn: AsyncConnection, path: str) -> LockedTenant | None:
    """A tenant, locked until the end of the transaction."""
    statement = select(tenants.c.id, tenants.c.version).where(tenants.c.path == path).with_for_update()
    row = (await conn.execute(statement)).one_or_none()
    return LockedTenant(row.id, row.version) if row else None


async def find_tenants(conn: AsyncConnection, paths: Sequence[str]) -> dict[str, UUID]:
    """The ids of these tenants, by path; those that do not exist are missing."""
    rows = await conn.execute(select(tenants.c.path, tenants.c.id).where(tenants.c.path == func.any(list(paths))))
    return {row.path: row.id for row in rows}


async def all_paths(conn: AsyncConnection) -> list[str]:
    return list((await conn.execute(select(tenants.c.path))).scalars())


async def insert_tenant(
    conn: AsyncConnection,
    *,
    tenant_id: UUID,
    path: str,
    parent_id: UUID | None,
    weight: float,
    preemption: Mapping[str, Any],
) -> bool:
    """Whether it was inserted: False where there is one by now, also one that another transaction just made."""
    row = {"id": tenant_id, "path": path, "parent_id": parent_id, "weight": weight, "preemption": dict(preemption)}
    statement = upsert(tenants).values(row).on_conflict_do_nothing(index_elements=[tenants.c.path])
    return (await conn.execute(statement)).rowcount == 1


async def change_tenant(conn: AsyncConnection, tenant_id: UUID, values: Mapping[str, Any]) -> int:
    """Set columns of a locked tenant; its new version."""
    statement = update(tenants).where(tenants.c.id == tenant_id).values(version=tenants.c.version + 1, **values)
    return (await conn.execute(statement.returning(tenants.c.version))).scalar_one()


async def replace_quotas(conn: AsyncConnection, tenant: LockedTenant, limits: Mapping[str, QuotaLimits]) -> int:
    """Give a locked tenant these quotas and no others; its new version."""
    await conn.execute(delete(quotas).where(quotas.c.tenant_id == tenant.id))
    if limits:
        rows = [{"tenant_id": tenant.id, "resource": name, **asdict(each)} for name, each in limits.items()]
        await conn.execute(insert(quotas), rows)
    # The trigger on quotas has counted rows; a version that moves by one per change is easier to follow.
    await conn.execute(update(tenants).where(tenants.c.id == tenant.id).values(version=tenant.version + 1))
    return tenant.version + 1
