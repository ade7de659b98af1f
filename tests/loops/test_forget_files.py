"""What jobs left in files is forgotten some time after their end, files first, and that of other jobs stays."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.request_profile import Wanted, request_profile
from phalanx_server.actions.save_output import save_output
from phalanx_server.actions.save_trace import save_rank_trace
from phalanx_server.domain.access import SYSTEM
from phalanx_server.loops.retain import BUSY_INTERVAL_S, INTERVAL_S, Keep, Retain
from phalanx_server.store.bundles import BundleFiles
from phalanx_server.store.logs import job_directory
from phalanx_server.store.outputs import GroupRef, OutputFiles, output_directory
from phalanx_server.store.profiles import RankRef, profile_directory
from phalanx_server.store.schema import leases, outputs, profile_ranks, profiles
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
    monkeypatch.setattr("phalanx_server.loops.retain.JOBS", 1)
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


async def test_files_that_nothing_names_go_with_their_job(plane: ControlPlane) -> None:
    """Left by a server that died in the middle of an upload, or whose commit got no answer."""
    await plane.add_nodes(1)
    runs, _ = await plane.run()
    job_id, attempt = await plane.run()
    await plane.report(plane.ended(attempt, 0))
    for of_job in (runs, job_id):
        for directory in (output_directory(of_job), job_directory(of_job)):
            (plane.storage / directory).mkdir(parents=True, exist_ok=True)
            (plane.storage / directory / "half").write_bytes(b"x")

    def left() -> set[str]:
        return {path.parent.name for path in plane.storage.rglob("half")}

    retain = retain_of(plane)
    await retain.tick(plane.later(9 * DAY_S))
    assert left() == {runs.hex, job_id.hex}
    await retain.tick(plane.later(2 * DAY_S))
    assert [path.parent.name for path in (plane.storage / "outputs").rglob("half")] == [runs.hex]
    await retain.tick(plane.later(20 * DAY_S))
    assert left() == {runs.hex}


async def test_profiles_go_with_their_traces(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    async with plane.engine.begin() as conn:
        profile = await request_profile(conn, job_id, Wanted(5), actor=SYSTEM, now=plane.now)
    await save_rank_trace(
        plane.engine,
        OutputFiles(plane.storage.as_uri()),
        RankRef(attempt.id, attempt.epoch, profile, 0),
        body(b"trace"),
        sha256=hashlib.sha256(b"trace").hexdigest(),
        size_bytes=5,
        node_id=(await plane.node("node-0")).id,
        now=plane.now,
    )
    await plane.report(plane.ended(attempt, 0))
    retain = retain_of(plane)
    await retain.tick(plane.later(9 * DAY_S))
    assert (plane.storage / profile_directory(job_id)).is_dir() and len(await plane.rows(profiles)) == 1
    await retain.tick(plane.later(2 * DAY_S))
    assert not (plane.storage / profile_directory(job_id)).exists()
    assert await plane.rows(profiles) == await plane.rows(profile_ranks) == []


async def test_each_job_is_looked_at_once(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were: a round costs what ended since the one before."""
    await plane.add_nodes(1)
    first = await ended(plane)
    await retain_of(plane).tick(plane.later(11 * DAY_S))
    second = await ended(plane)
    deleted: list[str] = []

    async def note(_: OutputFiles, paths: list[str]) -> None:
        deleted.extend(paths)

    monkeypatch.setattr(OutputFiles, "delete", note)
    await retain_of(plane).tick(plane.later(11 * DAY_S))
    assert deleted == [output_directory(second), profile_directory(second)] and first != second


async def test_what_the_storage_would_not_delete_is_deleted_later(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.add_nodes(1)
    job_id = await ended(plane)

    async def fail(_: OutputFiles, __: list[str]) -> None:
        raise OSError("away")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="away"):
        patch.setattr(OutputFiles, "delete", fail)
        await retain_of(plane).tick(plane.later(11 * DAY_S))
    assert await kept(plane) == {job_id}
    await retain_of(plane).tick(plane.now)
    assert await kept(plane) == set()


async def test_jobs_are_not_passed_over_while_their_volume_is_not_mounted(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await ended(plane)
    away = plane.storage.rename(plane.storage.with_name("away"))
    with pytest.raises(FileNotFoundError, match="mount"):
        await retain_of(plane).tick(plane.later(11 * DAY_S))
    away.rename(plane.storage)
    assert await kept(plane) == {job_id}
    await retain_of(plane).tick(plane.now)
    assert await kept(plane) == set()


async def test_more_rows_than_one_transaction_deletes_go_all_the_same(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx_server.store.retention.BATCH_ROWS", 2)
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    for number in range(5):
        await leave(plane, job_id, path=f"part-{number}")
    await plane.report(plane.ended(attempt, 0))
    await retain_of(plane).tick(plane.later(11 * DAY_S))
    assert await kept(plane) == set()


async def test_a_deposed_leader_forgets_none(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await ended(plane)
    async with plane.engine.begin() as conn:
        await conn.execute(update(leases).values(epoch=leases.c.epoch + 1))
    await retain_of(plane).tick(plane.later(400 * DAY_S))
    assert await kept(plane) == {job_id}
