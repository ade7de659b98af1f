"""Take what a node runner reports: heartbeat, logs, metrics and marks of the attempts on its node.

Owns the fencing (a report number is taken once; only attempts placed on this node, under their epoch), the shift of a
clock that is off, and the order of things: bytes of logs go to storage first, then one transaction takes the rest. What
of an attempt the database cannot hold is dropped and told; the heartbeat and the other attempts are taken all the same.
A report that cannot be taken now (storage or database are full, say) still says that the node is there: that much is
noted, its number stays free, and the runner sends it again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.actions.clock import Clock
from phalanx_server.actions.record_agent_report import attempt_id_of, release_lost
from phalanx_server.actions.record_marks import record_marks
from phalanx_server.actions.record_metrics import record_metrics
from phalanx_server.actions.recover_nodes import recover_nodes
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.messages import LogChunk, Mark, MetricPoint, NodeAnswer, NodeReport, Refused
from phalanx_server.domain.metric import RANK_MAX
from phalanx_server.store.attempts import Fence, load_fences, lock_attempts
from phalanx_server.store.engine import is_of_the_data
from phalanx_server.store.events import Event, record_once
from phalanx_server.store.logs import LogBatch, LogFiles, LogPiece, index_logs, job_directory
from phalanx_server.store.nodes import Heard, last_report, lost_attempts_without_ranks, note_heard, take_report
from phalanx_server.store.transactions import rerun_on_deadlock
from phalanx_server.store.wakeups import notify

log = structlog.get_logger("phalanx.reports")

OFFSET_MAX = 1 << 62
_SHOWN = {"warm_ready", "spool_bytes", "fullness"}  # of a heartbeat, beside its stats
# From so long after a loss on a heartbeat proves that nothing of the attempt is left: a start may have been under way.
SETTLING_S = 10.0
LATEST_S = 86_400.0  # no report is longer on its way


class Addressed(Protocol):
    """A part of a report that is about one attempt."""

    @property
    def attempt_id(self) -> str: ...
    @property
    def epoch(self) -> int: ...


Part = TypeVar("Part", bound=Addressed)


@dataclass
class Gate:
    """Lets through what the fences allow, and remembers what it refused."""

    fences: Mapping[UUID, Fence]
    now: datetime
    refused: dict[tuple[str, int], Refused] = field(default_factory=dict)

    def fence(self, part: Addressed) -> Fence | None:
        """The attempt that the part is about; None if the part is refused."""
        attempt_id = attempt_id_of(part.attempt_id)
        fence = self.fences.get(attempt_id) if attempt_id else None
        of_logs = isinstance(part, LogChunk)
        reason = fence.refusal(part.epoch, now=self.now, logs=of_logs) if fence else "unknown_attempt"
        if reason is None:
            return fence
        refusal = Refused(attempt_id=part.attempt_id, epoch=part.epoch, reason=reason)
        self.refused[part.attempt_id, part.epoch] = refusal
        return None

    def sort(self, parts: Iterable[Part]) -> dict[UUID, list[Part]]:
        """The parts that are taken, by attempt, in their order."""
        taken: dict[UUID, list[Part]] = {}
        for part in parts:
            fence = self.fence(part)
            if fence is not None:
                taken.setdefault(fence.id, []).append(part)
        return taken


async def record_node_report(
    engine: AsyncEngine, files: LogFiles, report: NodeReport, *, node_id: UUID, now: datetime
) -> NodeAnswer:
    """A report whose number was taken before changes nothing. What is refused is named in the answer. Raises
    StorageUnavailable where only the bytes of its logs found no place: the rest may be sent without them."""
    if report.left_out:
        log.warning("parts of a report cannot be read", node_id=node_id.hex, seq=report.seq, parts=report.left_out)
    clock = Clock(now=now, sent_at=report.sent_at)
    try:
        return await _take(engine, files, report, node_id=node_id, clock=clock)
    except Exception:
        await _note_heard(engine, _heard(report, node_id, clock))
        raise


async def _note_heard(engine: AsyncEngine, heard: Heard) -> None:
    try:
        async with engine.begin() as conn:
            await note_heard(conn, heard)
    except Exception as error:  # what kept the report out matters more
        log.warning("a heartbeat could not be noted", node_id=heard.node_id.hex, error=str(error)[:300])


@rerun_on_deadlock
async def _take(engine: AsyncEngine, files: LogFiles, report: NodeReport, *, node_id: UUID, clock: Clock) -> NodeAnswer:
    now = clock.now
    attempt_ids = {attempt_id for part in _parts(report) if (attempt_id := attempt_id_of(part.attempt_id)) is not None}
    async with engine.connect() as conn:
        last = await last_report(conn, node_id)
        fences = await load_fences(conn, attempt_ids, node_id=node_id) if report.logs else {}
    if last.runner_boot == report.boot and last.runner_seq >= report.seq:
        return NodeAnswer(server_time=now.timestamp(), accepted_seq=last.runner_seq)
    batches = log_batches(report, Gate(fences, now), clock, node_id)
    await asyncio.gather(*(files.write(batch.path, batch.content()) for batch in batches))
    async with engine.begin() as conn:
        if not await take_report(conn, _heard(report, node_id, clock)):
            last = await last_report(conn, node_id)
            return NodeAnswer(server_time=now.timestamp(), accepted_seq=last.runner_seq)
        gate = Gate(await load_fences(conn, attempt_ids, node_id=node_id, lock=bool(report.marks)), now)
        await _record(conn, report, gate, clock, batches)
        left = await _left_behind(conn, report, node_id, _said_at(clock, last))
    if left:
        await _release(engine, left, node_id, now)
    return NodeAnswer(server_time=now.timestamp(), accepted_seq=report.seq, refused=list(gate.refused.values()))


@dataclass(frozen=True)
class Content:
    """What was let through of a report, by attempt."""

    logs: Mapping[UUID, LogBatch]
    metrics: Mapping[UUID, Sequence[MetricPoint]]
    marks: Mapping[UUID, Sequence[Mark]]

    @property
    def attempts(self) -> list[UUID]:
        """Sorted: two nodes that share jobs lock their rows in one order."""
        return sorted(self.logs.keys() | self.metrics.keys() | self.marks.keys())

    def kinds(self) -> tuple[tuple[str, Mapping[UUID, object]], ...]:
        return ("logs", self.logs), ("metrics", self.metrics), ("job", self.marks)


async def _record(
    conn: AsyncConnection, report: NodeReport, gate: Gate, clock: Clock, batches: Sequence[LogBatch]
) -> None:
    taken = gate.sort(report.logs)
    logs = {batch.attempt_id: batch for batch in batches if batch.attempt_id in taken}
    content = Content(logs, gate.sort(report.metrics), gate.sort(report.marks))
    if not await _stored(conn, content, [gate.fences[each] for each in content.attempts], clock):
        await _store_each(conn, content, [gate.fences[each] for each in content.attempts], clock)
    jobs = {kind: {gate.fences[a].job_id.hex for a in parts} for kind, parts in content.kinds()}
    await notify(conn, *(f"{kind}:{job}" for kind, names in jobs.items() for job in names))


async def _store_each(conn: AsyncConnection, content: Content, fences: Sequence[Fence], clock: Clock) -> None:
    """Attempt by attempt; one whose content cannot be stored is told so, once."""
    for fence in fences:
        if not await _stored(conn, content, [fence], clock):
            message = "Part of its output, metrics or marks was dropped: it held a value that cannot be stored."
            note = Event(
                at=clock.now,
                kind=EventKind.NOTE.value,
                message=message,
                job_id=fence.job_id,
                attempt_id=fence.id,
                data={"unstored": True},
            )
            await record_once(conn, note, topic="unstored", at_most=1)


async def _stored(conn: AsyncConnection, content: Content, fences: Sequence[Fence], clock: Clock) -> bool:
    """Store what these attempts reported, all or nothing; False if the database cannot hold it."""
    try:
        async with conn.begin_nested():
            for fence in fences:
                await _store(conn, content, fence, clock)
        return True
    except DBAPIError as error:
        if not is_of_the_data(error):
            raise
        names = [fence.id.hex for fence in fences]
        log.warning("what was reported cannot be stored", attempts=names, error=str(error.orig)[:500])
        return False


async def _store(conn: AsyncConnection, content: Content, fence: Fence, clock: Clock) -> None:
    if fence.id in content.logs:
        await index_logs(conn, content.logs[fence.id])
    await record_metrics(conn, fence, content.metrics.get(fence.id, ()), clock)
    await record_marks(conn, fence, content.marks.get(fence.id, ()), clock)


def _parts(report: NodeReport) -> Iterable[Addressed]:
    return (*report.logs, *report.metrics, *report.marks)


def _heard(report: NodeReport, node_id: UUID, clock: Clock) -> Heard:
    beat = report.heartbeat
    stats = beat and beat.stats.encode() | beat.model_dump(mode="json", include=_SHOWN)
    return Heard(
        node_id=node_id, boot=report.boot, seq=report.seq, skew_s=clock.skew_s, at=clock.now, stats=stats or None
    )


# ------------------------------------------------------------------ logs


def log_batches(report: NodeReport, gate: Gate, clock: Clock, node_id: UUID) -> list[LogBatch]:
    """One file per attempt. Its name is made of the report's number, so that sending again writes the same file."""
    batches = []
    for attempt_id, chunks in gate.sort(report.logs).items():
        fence = gate.fences[attempt_id]
        pieces = [piece for chunk in chunks if (piece := _piece(chunk, fence, clock))]
        if pieces:
            name = f"{node_id.hex}-{report.boot}-{report.seq:010d}"
            path = f"{job_directory(fence.job_id)}/{attempt_id.hex}/{name}"
            batches.append(LogBatch(job_id=fence.job_id, attempt_id=attempt_id, path=path, pieces=pieces))
    return batches


def _piece(chunk: LogChunk, fence: Fence, clock: Clock) -> LogPiece | None:
    """The bytes of a chunk; None where there are none, or they do not read."""
    try:
        data = base64.b64decode(chunk.data, validate=True)
    except (binascii.Error, ValueError):
        return None
    in_range = 0 <= chunk.rank <= RANK_MAX and 0 <= chunk.offset <= OFFSET_MAX
    if not data or not in_range or chunk.stream not in ("stdout", "stderr"):
        return None
    at = clock.time(chunk.at, earliest=fence.created_at)
    return LogPiece(rank=chunk.rank, stream=chunk.stream, start_bytes=chunk.offset, data=data, at=at)


# ------------------------------------------------------------------ lost attempts that are gone


def _said_at(clock: Clock, last: Row[Any]) -> datetime:
    """When a report was sent, at the earliest: one that was long on its way tells of what was. It shows as a clock that
    is further behind than it was; if it is the clock after all, the next report says so."""
    late_s = clock.skew_s - last.clock_skew_s if last.clock_skew_s is not None else 0.0
    return clock.now - timedelta(seconds=min(max(0.0, late_s), LATEST_S))


async def _left_behind(conn: AsyncConnection, report: NodeReport, node_id: UUID, said_at: datetime) -> list[UUID]:
    """Lost attempts charged on the node of which the runner says that it has no ranks any more."""
    if report.heartbeat is None:
        return []
    present = [attempt_id for ref in report.heartbeat.attempts if (attempt_id := attempt_id_of(ref.attempt_id))]
    before = said_at - timedelta(seconds=SETTLING_S)
    return await lost_attempts_without_ranks(conn, node_id=node_id, present=present, before=before)


@rerun_on_deadlock
async def _release(engine: AsyncEngine, attempt_ids: Sequence[UUID], node_id: UUID, now: datetime) -> None:
    """In a transaction of its own: it locks jobs, which come before the attempts that marks have locked."""
    async with engine.begin() as conn:
        rows = {row.id: row for row in await lock_attempts(conn, attempt_ids)}
        await release_lost(conn, rows, {attempt_id: [node_id] for attempt_id in rows}, now=now)
    await recover_nodes(engine, now=now)
