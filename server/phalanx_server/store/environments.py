"""Registered environments: requirements under a name, in a tenant; seen from there and from everywhere below.

Owns the statements. A row is inserted and deleted, never changed: the name stands for the same packages as long as it
is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.tenant import lineage
from phalanx_server.store.job_views import SUBTREE
from phalanx_server.store.schema import environments


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentRow:
    """What is inserted for one environment."""

    id: UUID
    tenant_id: UUID
    name: str
    requirements: Sequence[str]
    created_by: str


async def insert_environment(conn: AsyncConnection, row: EnvironmentRow) -> bool:
    """Whether it was inserted: False where the tenant has one of this name."""
    values = {name: getattr(row, name) for name in EnvironmentRow.__slots__} | {"requirements": list(row.requirements)}
    key = [environments.c.tenant_id, environments.c.name]
    statement = upsert(environments).values(values).on_conflict_do_nothing(index_elements=key)
    return (await conn.execute(statement)).rowcount == 1


async def delete_environment(conn: AsyncConnection, environment_id: UUID) -> bool:
    """Whether there was one."""
    return (await conn.execute(delete(environments).where(environments.c.id == environment_id))).rowcount == 1


# ------------------------------------------------------------------ looking

_VIEW = """
SELECT e.id, e.name, t.path AS tenant, e.requirements, e.created_by, e.created_at
FROM environments e JOIN tenants t ON t.id = e.tenant_id
"""
_ONE = text(f"{_VIEW} WHERE e.id = :id")
_BY_NAME = _VIEW + "WHERE {conditions} ORDER BY e.name, t.path LIMIT :limit"
# What a tenant may look at: what it and those below it registered, and what it inherits.
_VISIBLE = f"({SUBTREE} OR path = ANY(CAST(:above AS text[])))"


async def load_environment(conn: AsyncConnection, environment_id: UUID) -> Row[Any] | None:
    return (await conn.execute(_ONE, {"id": environment_id})).one_or_none()


async def list_environments(
    conn: AsyncConnection, *, tenant: str | None, name: str | None, after: tuple[str, str] | None, limit: int
) -> list[Row[Any]]:
    """Environments by name, then tenant, after the (name, tenant) `after`: those that `tenant` sees (None = all), with
    `name` only those that are called so."""
    given = {
        _VISIBLE: {"tenant": tenant, "above": lineage(tenant)} if tenant else None,
        "e.name = :name": {"name": name} if name is not None else None,
        "(e.name, t.path) > (:after_name, :after_path)": (
            {"after_name": after[0], "after_path": after[1]} if after else None
        ),
    }
    used = {condition: bound for condition, bound in given.items() if bound is not None}
    values = {key: value for bound in used.values() for key, value in bound.items()} | {"limit": limit}
    return list(await conn.execute(text(_BY_NAME.format(conditions=" AND ".join(used) or "true")), values))


# ------------------------------------------------------------------ what names stand for

# Each wanted name of each tenant stands there once for every tenant in its line, so that all are looked up by index.
_NEAREST = text(
    """
    SELECT DISTINCT ON (wanted.tenant, wanted.name) wanted.tenant, wanted.name, e.requirements
    FROM unnest(CAST(:tenants AS text[]), CAST(:names AS text[]), CAST(:lines AS text[])) AS wanted (tenant, name, path)
    JOIN tenants t ON t.path = wanted.path
    JOIN environments e ON e.tenant_id = t.id AND e.name = wanted.name
    ORDER BY wanted.tenant, wanted.name, length(t.path) DESC
    """
)
_NAMES = text(
    """
    SELECT line.tenant, e.name
    FROM unnest(CAST(:tenants AS text[]), CAST(:lines AS text[])) AS line (tenant, path)
    JOIN tenants t ON t.path = line.path JOIN environments e ON e.tenant_id = t.id
    """
)


async def nearest_environments(
    conn: AsyncConnection, wanted: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """The requirements that each (tenant, name) stands for: of the nearest one going up from the tenant. Those that
    nobody has registered are missing."""
    rows = [(tenant, name, path) for tenant, name in sorted(set(wanted)) for path in lineage(tenant)]
    tenants, names, lines = map(list, zip(*rows, strict=True))
    found = await conn.execute(_NEAREST, {"tenants": tenants, "names": names, "lines": lines})
    return {(row.tenant, row.name): tuple(row.requirements) for row in found}


async def environment_names(conn: AsyncConnection, tenants: Iterable[str]) -> dict[str, set[str]]:
    """For each tenant the names that its jobs can use; tenants that can use none are missing."""
    rows = [(tenant, path) for tenant in sorted(set(tenants)) for path in lineage(tenant)]
    columns: dict[str, Any] = {"tenants": [tenant for tenant, _ in rows], "lines": [path for _, path in rows]}
    names: dict[str, set[str]] = {}
    for row in await conn.execute(_NAMES, columns):
        names.setdefault(row.tenant, set()).add(row.name)
    return names
