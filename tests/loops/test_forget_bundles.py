"""Code bundles that nothing uses any more are forgotten; none while a job or an upload of this moment counts on it."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.save_bundle import save_bundle
from phalanx_server.domain.access import SYSTEM
from phalanx_server.loops.retain import Keep, Retain
from phalanx_server.store import ids
from phalanx_server.store.bundles import BundleFiles, forget_bundles
from phalanx_server.store.jobs import missing_bundles
from phalanx_server.store.outputs import OutputFiles
from phalanx_server.store.schema import bundles, jobs, tenants
from sqlalchemy import insert, update

KEEP = Keep(metrics=timedelta(days=7), events=timedelta(days=90), logs=timedelta(days=30), bundles=timedelta(days=10))
DIGEST = hashlib.sha256(b"code").hexdigest()
DAY_S = 86400.0


class Store:
    """Bundles of a control plane, and the duty that forgets them."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self.plane = plane
        self.files = BundleFiles(plane.storage.as_uri())
        self.retain = Retain(
            plane.engine,
            plane.leader,
            keep=KEEP,
            files=plane.files,
            bundles=self.files,
            outputs=OutputFiles(plane.storage.as_uri()),
        )
        self.source = directory / "code"
        self.source.write_bytes(b"code")

    async def put(self, tenant: str = "default") -> None:
        """As `api.bundles` does it; used by the plane's clock."""
        await self.files.write(DIGEST, self.source)
        await save_bundle(self.plane.engine, tenant, digest=DIGEST, size_bytes=4, actor=SYSTEM)
        async with self.plane.engine.begin() as conn:
            await conn.execute(update(bundles).values(used_at=self.plane.now))
        await self.files.write(DIGEST, self.source)

    async def state(self) -> tuple[int, bool]:
        """How many tenants have it, and whether the file is there."""
        return len(await self.plane.rows(bundles)), await self.files.size_bytes(DIGEST) is not None

    async def after_days(self, days: float) -> tuple[int, bool]:
        await self.retain.tick(self.plane.later(days * DAY_S))
        return await self.state()


@pytest.fixture
def store(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(plane, tmp_path_factory.mktemp("upload"))


async def run_with(plane: ControlPlane, digest: str) -> UUID:
    """A queued job that runs a bundle."""
    job_id = await plane.submit()
    async with plane.engine.begin() as conn:
        await conn.execute(update(jobs).where(jobs.c.id == job_id).values(bundle=digest))
    return job_id


async def test_a_bundle_is_kept_while_it_is_young_and_then_forgotten(plane: ControlPlane, store: Store) -> None:
    await store.put()
    assert await store.after_days(9) == (1, True)
    assert await store.after_days(2) == (0, False)
    assert [path for path in (plane.storage / "bundles").rglob("*") if path.is_file()] == []
    await store.put()
    assert await store.state() == (1, True)


async def test_the_bundle_of_a_job_is_kept_until_the_job_is_over_as_long(plane: ControlPlane, store: Store) -> None:
    await store.put()
    job_id = await run_with(plane, DIGEST)
    assert await store.after_days(400) == (1, True)
    over = {"state": "cancelled", "finished_at": plane.now}
    async with plane.engine.begin() as conn:
        await conn.execute(update(jobs).where(jobs.c.id == job_id).values(over))
    assert await store.after_days(9) == (1, True)
    assert await store.after_days(2) == (0, False)


async def test_a_file_stays_while_another_tenant_has_it(plane: ControlPlane, store: Store) -> None:
    async with plane.engine.begin() as conn:
        await conn.execute(insert(tenants).values(id=ids.new_id(), path="other"))
    await store.put("other")
    await store.put()
    async with plane.engine.begin() as conn:
        young = update(bundles).where(bundles.c.tenant_id == plane.tenant_id)
        await conn.execute(young.values(used_at=plane.now + timedelta(days=30)))
    assert await store.after_days(11) == (1, True)
    assert await store.after_days(30) == (0, False)


async def test_an_upload_meanwhile_has_its_file_in_the_end(
    plane: ControlPlane, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the deletion the same code is uploaded again."""
    for step in ("set_aside", "put_back", "delete_aside"):
        for when in ("before", "after"):
            await store.put()
            taken = getattr(BundleFiles, step)

            async def interleaved(files: BundleFiles, digest: str, taken=taken, when=when) -> None:
                if when == "before":
                    await store.put()
                await taken(files, digest)
                if when == "after":
                    await store.put()

            with monkeypatch.context() as patched:
                patched.setattr(BundleFiles, step, interleaved)
                rows, there = await store.after_days(11)
            assert rows == 0 or there, (step, when)


async def test_a_submit_waits_for_who_forgets_its_bundle_and_is_told(plane: ControlPlane, store: Store) -> None:
    await store.put()
    pair = (plane.tenant_id, DIGEST)
    async with plane.engine.begin() as conn:
        await conn.execute(update(bundles).values(used_at=datetime.now(UTC) - timedelta(days=20)))
    async with asyncio.timeout(20):
        async with plane.engine.begin() as forgets:
            before = datetime.now(UTC) - timedelta(days=10)
            assert await forget_bundles(forgets, before=before, limit=10) == [DIGEST]
            submit = asyncio.create_task(missing(plane, pair))
            while not await somebody_waits(plane):  # noqa: ASYNC110 - the database has no event for it
                await asyncio.sleep(0.01)
        assert await submit == {pair}


async def test_a_bundle_that_is_being_submitted_is_not_forgotten(plane: ControlPlane, store: Store) -> None:
    await store.put()
    pair = (plane.tenant_id, DIGEST)
    async with plane.engine.begin() as conn:
        await conn.execute(update(bundles).values(used_at=datetime.now(UTC) - timedelta(days=20)))
    before = datetime.now(UTC) - timedelta(days=10)
    async with plane.engine.begin() as submits:
        assert await missing_bundles(submits, [pair]) == set()
        async with plane.engine.begin() as conn:
            assert await forget_bundles(conn, before=before, limit=10) == []
    async with plane.engine.begin() as conn:
        assert await forget_bundles(conn, before=before, limit=10) == [], "it was used"


async def missing(plane: ControlPlane, pair: tuple[UUID, str]) -> set[tuple[UUID, str]]:
    async with plane.engine.begin() as conn:
        return await missing_bundles(conn, [pair])


async def somebody_waits(plane: ControlPlane) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with plane.engine.connect() as conn:
        return (await conn.exec_driver_sql(query)).scalar_one() > 0
