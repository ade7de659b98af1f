"""Maintenance windows: as operators declare them, and as a pass sees them.

Owns the statements. A window covers the nodes that it names and those that have all of its labels, at any moment those
that do then: a node that joins later too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.snapshot import Maintenance
from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import maintenance

# The ids of the nodes of a window `m`. Each that it names is looked up by its key: with a condition on all nodes, each
# of them would be sought in the list.
_COVERED = """
    (SELECT n.id FROM unnest(m.nodes) AS named (id) JOIN nodes n ON n.id = named.id
     UNION SELECT n.id FROM nodes n WHERE m.labels <> '{}' AND n.labels @> m.labels)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRow:
    """What is inserted for one window."""

    id: UUID
    nodes: Sequence[UUID]
    labels: Mapping[str, str]
    starts_at: datetime
    ends_at: datetime
    reason: str
    created_by: str


async def insert_window(conn: AsyncConnection, row: WindowRow) -> None:
    await conn.execute(insert(maintenance).values(asdict(row)))


async def lock_window(conn: AsyncConnection, window_id: UUID) -> Row[Any] | None:
    """A window, locked until the end of the transaction."""
    query = select(maintenance).where(maintenance.c.id == window_id).with_for_update()
    return (await conn.execute(query)).one_or_none()


async def update_window(conn: AsyncConnection, window_id: UUID, values: Mapping[str, Any]) -> None:
    """Set columns of a locked window."""
    changed = update(maintenance).where(maintenance.c.id == window_id)
    await conn.execute(changed.values(version=maintenance.c.version + 1, **values))


async def delete_window(conn: AsyncConnection, window_id: UUID) -> None:
    await conn.execute(delete(maintenance).where(maintenance.c.id == window_id))


# ------------------------------------------------------------------ what names and labels mean

_NODES_CALLED = text(
    """
    SELECT n.id, n.name, c.name AS cluster FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.name = ANY(CAST(:names AS text[])) OR n.id = ANY(CAST(:ids AS uuid[])) ORDER BY c.name
    """
)
_NODE_NAMES = text("SELECT DISTINCT name FROM nodes")
_HAS_NODE = text("SELECT EXISTS (SELECT FROM nodes WHERE labels @> CAST(:labels AS jsonb))")
_VALUES = text(
    "SELECT DISTINCT labels->>CAST(:key AS text) AS value FROM nodes WHERE labels ? :key ORDER BY 1 LIMIT 10"
)


async def nodes_called(conn: AsyncConnection, *, names: Sequence[str], ids: Sequence[UUID]) -> list[Row[Any]]:
    """Id, name and cluster of the nodes that have one of these names, in any cluster, or one of these ids."""
    return list(await conn.execute(_NODES_CALLED, {"names": list(names), "ids": list(ids)}))


async def node_names(conn: AsyncConnection) -> list[str]:
    return list((await conn.execute(_NODE_NAMES)).scalars())


async def some_node_has(conn: AsyncConnection, labels: Mapping[str, str]) -> bool:
    """Whether there is a node with all of these labels."""
    return (await conn.execute(_HAS_NODE, {"labels": dump_json(dict(labels))})).scalar_one()


async def values_of_label(conn: AsyncConnection, key: str) -> list[str]:
    """The first few values that nodes have of a label."""
    return list((await conn.execute(_VALUES, {"key": key})).scalars())


# ------------------------------------------------------------------ looked at

_VIEW = f"""
    SELECT m.id, m.labels, m.starts_at, m.ends_at, m.reason, m.created_by, m.created_at, m.version,
           ARRAY(SELECT n.name FROM (SELECT DISTINCT unnest(m.nodes) AS id) named JOIN nodes n ON n.id = named.id
                 ORDER BY n.name) AS nodes,
           (SELECT count(*) FROM {_COVERED} covered) AS covers
    FROM maintenance m
"""
_ONE = text(f"{_VIEW} WHERE m.id = :id")


async def load_window(conn: AsyncConnection, window_id: UUID) -> Row[Any] | None:
    return (await conn.execute(_ONE, {"id": window_id})).one_or_none()


async def list_windows(
    conn: AsyncConnection, *, ends_after: datetime | None, after: tuple[datetime, UUID] | None, limit: int
) -> list[Row[Any]]:
    """Windows by their start, after the (start, id) `after`; `ends_after` leaves out those that end before."""
    given = {
        "m.ends_at > :ends_after": {"ends_after": ends_after} if ends_after else None,
        "(m.starts_at, m.id) > (:start, :id)": {"start": after[0], "id": after[1]} if after else None,
    }
    used = {condition: bound for condition, bound in given.items() if bound is not None}
    values = {key: value for bound in used.values() for key, value in bound.items()} | {"limit": limit}
    statement = f"{_VIEW} WHERE {' AND '.join(used) or 'true'} ORDER BY m.starts_at, m.id LIMIT :limit"
    return list(await conn.execute(text(statement), values))


# ------------------------------------------------------------------ as a pass sees them

EDITION = """
    (SELECT coalesce(string_agg(m.id || ' ' || m.version, ',' ORDER BY m.id), '')
     FROM maintenance m WHERE m.ends_at > :now)
"""
"""A part of a statement: which windows there are that are not over, and how often each was changed. What a pass knows
stays right while this does, and the nodes do."""
_WINDOWS = text(
    f"""
    SELECT m.starts_at, m.ends_at, array_agg(covered.id ORDER BY covered.id) AS nodes
    FROM maintenance m CROSS JOIN LATERAL {_COVERED} covered WHERE m.ends_at > :now
    GROUP BY m.id ORDER BY m.starts_at, m.id
    """
)


@dataclass(frozen=True, slots=True)
class Windows:
    """Those that are not over, of one edition."""

    edition: str = ""
    windows: tuple[Maintenance, ...] = ()


async def load_windows(conn: AsyncConnection, edition: str, now: datetime) -> Windows:
    """The windows of an edition that was read in the same transaction; those without any node are left out."""
    if not edition:
        return Windows()
    rows = await conn.execute(_WINDOWS, {"now": now})
    return Windows(edition, tuple(_window(row) for row in rows))


def _window(row: Row[Any]) -> Maintenance:
    nodes = tuple(node.hex for node in row.nodes)
    return Maintenance(nodes=nodes, starts_at=row.starts_at.timestamp(), ends_at=row.ends_at.timestamp())
