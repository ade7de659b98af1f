"""Outputs are forgotten some time after the end of their job, files first, and those of other jobs stay."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.save_output import save_output
from phalanx_server.loops.retain import BUSY_INTERVAL_S, INTERVAL_S, Keep, Retain
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.outputs import GroupRef, OutputFiles
from phalanx_server.store.schema import leases, outputs
from sqlalchemy import update

DAY_S = 86_400
KEEP = Keep(metrics=timedelta(days=7), events=timedelta(days=90), logs=timedelta(days=30), outputs=timedelta(days=10))


def retain_of(plane: ControlPlane) -> Retain:
    bundles = BundleFiles(plane.storage.as_uri())
    files = OutputFiles(plane.storage.as_uri())
    return Retain(plane.engine, plane.leader, keep=KEEP, files=plane.files, bundles=bundles, outputs=files)


async def body(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def leave(plane: ControlPlane, job_id: UUID, path: str = "model.pt", content: bytes = b"weights") -> None:
    """As the node of its only group does."""
    attempt = await plane.attempt(job_id)
    await save_output(
        plane.engine,
        OutputFiles(plane.storage.as_uri()),
        GroupRef(attempt.id, attempt.epoch, 0),
        body(content),
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        node_id=(await plane.node("node-0")).id,
        now=plane.now,
    )


async def ended(plane: ControlPlane) -> UUID:
    """A job that has left a file and ended."""
    job_id, attempt = await plane.run()
    await leave(plane, job_id)
    await plane.report(plane.ended(attempt, 0))
    assert await plane.state(job_id) == "succeeded"
    return job_id


def files(plane: ControlPlane) -> list[Path]:
    return [path for path in (plane.storage / "outputs").rglob("*") if path.is_file()]


async def kept(plane: ControlPlane) -> set[UUID]:
    rows: list[Any] = await plane.rows(outputs)
    assert sorted(row.url for row in rows) == sorted(str(path.relative_to(plane.storage)) for path in files(plane))
    return {row.job_id for row in rows}


async def test_they_go_some_time_after_the_end_of_their_job(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    runs, _ = await plane.run()
    await leave(plane, runs)
    first = await ended(plane)
    plane.later(5 * DAY_S)
    second = await ended(plane)
    retain = retain_of(plane)
    await retain.tick(plane.later(4 * DAY_S))
    assert await kept(plane) == {runs, first, second}
    await retain.tick(plane.later(2 * DAY_S))
    assert await kept(plane) == {runs, second}
    await retain.tick(plane.later(400 * DAY_S))
    assert await kept(plane) == {runs}, "a job that is not over keeps its outputs"


async def test_a_round_is_bounded(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx_server.loops.retain.OUTPUT_JOBS", 1)
    await plane.add_nodes(1)
    for _ in range(2):
        await ended(plane)
    retain = retain_of(plane)
    plane.later(11 * DAY_S)
    seen = []
    for _ in range(3):
        await retain.tick(plane.now)
        seen.append((len(await kept(plane)), retain.pause_s))
    assert seen == [(1, BUSY_INTERVAL_S), (0, BUSY_INTERVAL_S), (0, INTERVAL_S)]


async def test_a_deposed_leader_forgets_none(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await ended(plane)
    async with plane.engine.begin() as conn:
        await conn.execute(update(leases).values(epoch=leases.c.epoch + 1))
    await retain_of(plane).tick(plane.later(400 * DAY_S))
    assert await kept(plane) == {job_id}
