"""Retention: make partitions ahead of time, and forget what is older than it is kept.

Owns how long each thing is kept, and that a tick does a bounded piece of the work. Files of a job go by directory, so
that those go too that nothing names (a server died before it wrote the row), and before their rows, so that nothing is
orphaned when it is interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.expect_lease import LeaseLost, leading
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.ticking import Pulse, tick_forever
from phalanx_server.store.bundles import BundleFiles, bundles_of_anybody, forget_bundles
from phalanx_server.store.leases import Lease
from phalanx_server.store.logs import LogFiles, job_directory
from phalanx_server.store.outputs import OutputFiles, output_directory
from phalanx_server.store.profiles import profile_directory
from phalanx_server.store.retention import (
    delete_of_jobs,
    delete_old,
    delete_old_events,
    delete_stray_holds,
    drop_metrics,
    drop_rollups,
    ended_jobs,
    ensure_partitions,
    note_forgotten,
)

log = structlog.get_logger()

INTERVAL_S = 600.0
# While there is more to forget than one round does.
BUSY_INTERVAL_S = 1.0
AHEAD = timedelta(days=2)
JOBS = 500
BUNDLES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How long things are kept."""

    metrics: timedelta
    events: timedelta  # and roll-ups, audit rows, and maintenance windows that are over
    logs: timedelta  # after the end of their job
    bundles: timedelta = timedelta(days=30)  # after the last use, and the end of every job that ran them
    outputs: timedelta = timedelta(days=30)  # and traces, after the end of their job
    idempotency_keys: timedelta = timedelta(days=1)
    outbox: timedelta = timedelta(days=7)
    leases: timedelta = timedelta(days=1)
    tokens: timedelta = timedelta(days=1)  # of nodes, after they ran out


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesOfJobs:
    """One kind of files, each job's in a directory of its own, with rows in a table that say which is what."""

    table: str
    keep: timedelta
    directory: Callable[[UUID], str]
    delete: Callable[[list[str]], Awaitable[None]]


class Retain:
    """`tick` does one round; it does nothing while another process leads."""

    def __init__(
        self,
        engine: AsyncEngine,
        leader: Leader,
        *,
        keep: Keep,
        files: LogFiles,
        bundles: BundleFiles,
        outputs: OutputFiles,
    ) -> None:
        self._engine = engine
        self._leader = leader
        self._keep = keep
        self._bundles = bundles
        self._files = (
            FilesOfJobs(table="logs", keep=keep.logs, directory=job_directory, delete=files.delete),
            FilesOfJobs(table="outputs", keep=keep.outputs, directory=output_directory, delete=outputs.delete),
            FilesOfJobs(table="profiles", keep=keep.outputs, directory=profile_directory, delete=outputs.delete),
        )
        self.pulse = Pulse()
        self.caught_up_at: datetime | None = None
        """When a round of this leader last left nothing behind that should be forgotten; that of its first, before."""
        self.pause_s = INTERVAL_S
        """How long until the next round: a moment, while there is more than a round does."""

    async def tick(self, now: datetime) -> None:
        self.pause_s = INTERVAL_S
        lease = self._leader.lease
        if lease is None:
            self.caught_up_at = None
            return
        self.caught_up_at = self.caught_up_at or now
        try:
            more = await self._round(lease, now)
        except LeaseLost as lost:
            log.warning("nothing more is forgotten", why=str(lost))
            return
        self.pause_s = BUSY_INTERVAL_S if more else INTERVAL_S
        self.caught_up_at = self.caught_up_at if more else now

    async def _round(self, lease: Lease, now: datetime) -> bool:
        """Whether there may be more to forget."""
        keep = self._keep
        async with leading(self._engine, lease) as conn:
            await ensure_partitions(conn, now=now, ahead=AHEAD)
        async with leading(self._engine, lease) as conn:
            await drop_metrics(conn, before=now - keep.metrics)
            await drop_rollups(conn, before=now - keep.events)
        more = await self._delete_rows(lease, now)
        more |= await self._forget_bundles(lease, now - keep.bundles)
        for files in self._files:
            more |= await self._forget_files(lease, files, now)
        return more

    async def _delete_rows(self, lease: Lease, now: datetime) -> bool:
        """Delete at most a batch of each table; whether there may be more."""
        keep = self._keep
        ages = {
            "events": keep.events,
            "audit": keep.events,
            "maintenance": keep.events,
            "idempotency_keys": keep.idempotency_keys,
            "outbox": keep.outbox,
            "leases": keep.leases,
            "tokens": keep.tokens,
        }
        async with leading(self._engine, lease) as conn:
            more = await delete_old_events(conn, before=now - keep.events)
            await delete_stray_holds(conn)
        for table, age in ages.items():
            async with leading(self._engine, lease) as conn:
                more |= await delete_old(conn, table, before=now - age)
        return more

    async def _forget_files(self, lease: Lease, files: FilesOfJobs, now: datetime) -> bool:
        """Delete what at most JOBS jobs have left, oldest end first; whether there may be more."""
        async with self._engine.connect() as conn:
            ended = await ended_jobs(conn, files.table, before=now - files.keep, limit=JOBS)
        if ended:
            job_ids = [job.job_id for job in ended]
            await files.delete([files.directory(job_id) for job_id in job_ids])
            more = True
            while more:
                async with leading(self._engine, lease) as conn:
                    more = await delete_of_jobs(conn, files.table, job_ids)
            async with leading(self._engine, lease) as conn:
                await note_forgotten(conn, files.table, ended[-1])
        return len(ended) == JOBS

    async def _forget_bundles(self, lease: Lease, before: datetime) -> bool:
        """Forget at most BUNDLES bundles; whether there may be more. Rows go first, so that no submit counts on a file
        that is about to go; a round that is interrupted leaves files behind."""
        async with leading(self._engine, lease) as conn:
            digests = await forget_bundles(conn, before=before, limit=BUNDLES)
        if digests:
            await self._delete_files(set(digests))
        return len(digests) == BUNDLES

    async def _delete_files(self, digests: set[str]) -> None:
        """Those that no tenant has. Who uploads one at this moment looks for the file after writing the row; here it is
        set aside before looking for a row: one of the two sees the other, and there is a file in the end."""
        async with self._engine.connect() as conn:
            digests = digests - await bundles_of_anybody(conn, list(digests))
        for digest in digests:
            await self._bundles.set_aside(digest)
        async with self._engine.connect() as conn:
            wanted = await bundles_of_anybody(conn, list(digests))
        for digest in digests & wanted:
            await self._bundles.put_back(digest)
        for digest in digests - wanted:
            await self._bundles.delete_aside(digest)

    async def run_forever(self) -> None:
        """Partitions must exist before they are needed: the first round comes with the election."""
        await self._leader.elected.wait()
        await tick_forever(self.tick, lambda: asyncio.sleep(self.pause_s), name="retain", pulse=self.pulse)
