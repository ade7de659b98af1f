"""Tenants in the database: the tree, its quotas, and what is used of them.

Owns the queries. Use is what placements charge: those not yet released, whatever the state of their attempt. Refuses to
judge who may look; callers pass the subtree that they are confined to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Select, delete, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.tenant import QuotaLimits
from phalanx_server.store.schema import quotas, tenants


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant as it is stored. `usage` counts GPUs by type in its whole subtree, right now."""

    id: UUID
    path: str
    parent: str | None
    weight: float
    preemption: Mapping[str, Any]
    version: int
    uid: int
    quotas: Mapping[str, QuotaLimits] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)


# The GPUs of what is charged, by tenant path and GPU type.
_USAGE = text(
    """
    SELECT t.path, n.gpu_type, sum(cardinality(p.gpu_indices)) AS gpus
    FROM placements p
    JOIN nodes n ON n.id = p.node_id
    JOIN attempts a ON a.id = p.attempt_id
    JOIN jobs j ON j.id = a.job_id
    JOIN tenants t ON t.id = j.tenant_id
    WHERE p.released_at IS NULL
    GROUP BY t.path, n.gpu_type
    HAVING sum(cardinality(p.gpu_indices)) > 0
    """
)
_CHANGE_VERSION = tenants.c.version + 1


async def get_tenant(conn: AsyncConnection, path: str) -> TenantRecord | None:
    records = await _read(conn, _select().where(tenants.c.path == path))
    return records[0] if records else None


async def list_tenants(
    conn: AsyncConnection, *, within: str | None, after: str | None, limit: int
) -> list[TenantRecord]:
    """At most `limit` tenants of the subtree `within` (None = of all), by path, those after path `after`."""
    statement = _select().order_by(tenants.c.path.collate("C")).limit(limit)
    if within is not None:
        statement = statement.where(
            (tenants.c.path == within) | tenants.c.path.startswith(within + "/", autoescape=True)
        )
    if after is not None:
        statement = statement.where(tenants.c.path.collate("C") > after)
    return await _read(conn, statement)


async def lock_tenant(conn: AsyncConnection, path: str) -> Row[Any] | None:
    """Its id and version, locked until the end of the transaction."""
    statement = select(tenants.c.id, tenants.c.version).where(tenants.c.path == path).with_for_update()
    return (await conn.execute(statement)).one_or_none()


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
) -> None:
    row = {"id": tenant_id, "path": path, "parent_id": parent_id, "weight": weight, "preemption": dict(preemption)}
    await conn.execute(insert(tenants).values(row))


async def change_tenant(conn: AsyncConnection, tenant_id: UUID, values: Mapping[str, Any]) -> int:
    """Set columns; the new version."""
    statement = update(tenants).where(tenants.c.id == tenant_id).values(version=_CHANGE_VERSION, **values)
    return (await conn.execute(statement.returning(tenants.c.version))).scalar_one()


async def replace_quotas(conn: AsyncConnection, tenant_id: UUID, limits: Mapping[str, QuotaLimits]) -> int:
    """These quotas and no others; the tenant's new version, one up whatever the number of rows."""
    before = (await conn.execute(select(tenants.c.version).where(tenants.c.id == tenant_id))).scalar_one()
    await conn.execute(delete(quotas).where(quotas.c.tenant_id == tenant_id))
    if limits:
        rows = [{"tenant_id": tenant_id, "resource": name, **asdict(each)} for name, each in limits.items()]
        await conn.execute(insert(quotas), rows)
    # The trigger on quotas counts rows; a version that moves by one per change is easier to follow.
    statement = update(tenants).where(tenants.c.id == tenant_id).values(version=before + 1)
    return (await conn.execute(statement.returning(tenants.c.version))).scalar_one()


def _select() -> Select[Any]:
    parent = tenants.alias("parent")
    columns = [tenants.c[name] for name in ("id", "path", "weight", "preemption", "version", "uid")]
    joined = tenants.outerjoin(parent, parent.c.id == tenants.c.parent_id)
    return select(*columns, parent.c.path.label("parent")).select_from(joined)


async def _read(conn: AsyncConnection, statement: Select[Any]) -> list[TenantRecord]:
    rows = (await conn.execute(statement)).mappings().all()
    limits = await _quotas_of(conn, [row["id"] for row in rows])
    usage = list(await conn.execute(_USAGE)) if rows else []
    return [
        TenantRecord(**row, quotas=limits.get(row["id"], {}), usage=_subtree_usage(usage, row["path"])) for row in rows
    ]


async def _quotas_of(conn: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, dict[str, QuotaLimits]]:
    found: dict[UUID, dict[str, QuotaLimits]] = {}
    statement = select(quotas).where(quotas.c.tenant_id == func.any(list(ids))).order_by(quotas.c.resource)
    for row in await conn.execute(statement):
        limits = QuotaLimits(row.nominal, row.borrowing_limit, row.lending_limit)
        found.setdefault(row.tenant_id, {})[row.resource] = limits
    return found


def _subtree_usage(usage: Sequence[Row[Any]], path: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for row in usage:
        if row.path == path or row.path.startswith(path + "/"):
            total[row.gpu_type] = total.get(row.gpu_type, 0) + int(row.gpus)
    return total
