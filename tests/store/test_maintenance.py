"""What maintenance windows cover, and that it is found in a time that grows with what they name alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from phalanx_server.store.ids import new_id
from phalanx_server.store.maintenance import WindowRow, insert_window, list_windows, load_windows
from phalanx_server.store.schema import clusters
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

NOW = datetime(2030, 5, 1, tzinfo=UTC)
MANY_NODES, MANY_WINDOWS, LONGEST_MS = 20_000, 5, 3_000


_FILL = text(
    r"""
    INSERT INTO nodes (id, cluster_id, name, ray_node_id, gpu_type, gpus, cpus, memory_bytes, address, labels)
    SELECT gen_random_uuid(), :cluster, 'n' || n, 'x', 'h100', 8, 64, 1, '10.0.0.1',
           CAST(CASE WHEN n = :count - 1 THEN '{"rack"\: "r1"}' ELSE '{}' END AS jsonb)
    FROM generate_series(0, :count - 1) n
    """
)


async def fill(conn: AsyncConnection, count: int) -> list[UUID]:
    """Nodes n0, n1, …, the last of which has the label rack=r1; their ids."""
    cluster = new_id()
    await conn.execute(insert(clusters).values(id=cluster, name="c"))
    await conn.execute(_FILL, {"cluster": cluster, "count": count})
    return list((await conn.execute(text("SELECT id FROM nodes ORDER BY CAST(substr(name, 2) AS integer)"))).scalars())


async def declare(conn: AsyncConnection, named: Sequence[UUID], **labels: str) -> UUID:
    row = WindowRow(
        id=new_id(),
        nodes=named,
        labels=labels,
        starts_at=NOW,
        ends_at=NOW + timedelta(hours=1),
        reason="",
        created_by="x",
    )
    await insert_window(conn, row)
    return row.id


async def seen(conn: AsyncConnection) -> list[tuple[str, ...]]:
    """The nodes of each window, as a pass is told."""
    return [window.nodes for window in (await load_windows(conn, "some", NOW)).windows]


CASES = {
    "by name": ([0, 1], {}, {0, 1}, ["n0", "n1"]),
    "by label": ([], {"rack": "r1"}, {2}, []),
    "by both, each node once": ([0, 2], {"rack": "r1"}, {0, 2}, ["n0", "n2"]),
    "a name given twice": ([1, 1], {}, {1}, ["n1"]),
    "a label that no node has": ([0], {"rack": "r9"}, {0}, ["n0"]),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_window_covers_what_it_names_and_what_has_its_labels(engine: AsyncEngine, case: str) -> None:
    named, labels, covered, names = CASES[case]
    async with engine.begin() as conn:
        made = await fill(conn, 3)
        await declare(conn, [made[n] for n in named], **labels)
        assert await seen(conn) == [tuple(sorted(made[n].hex for n in covered))]
        (window,) = await list_windows(conn, ends_after=None, after=None, limit=10)
    assert (window.covers, window.nodes) == (len(covered), names)


async def test_windows_that_name_very_many_nodes_are_read_in_a_moment(engine: AsyncEngine) -> None:
    """Each node that a window names is looked up; not every node in every list."""
    async with engine.begin() as conn:
        made = await fill(conn, MANY_NODES)
        for _ in range(MANY_WINDOWS):
            await declare(conn, made)
        await declare(conn, [], rack="r1")
    async with engine.begin() as conn:
        await conn.execute(text(f"SET LOCAL statement_timeout = {LONGEST_MS}"))
        assert sorted(map(len, await seen(conn))) == [1] + [MANY_NODES] * MANY_WINDOWS
        listed = await list_windows(conn, ends_after=None, after=None, limit=50)
    assert sorted(row.covers for row in listed) == [1] + [MANY_NODES] * MANY_WINDOWS
