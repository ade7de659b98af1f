"""Take marks of one attempt: things that happen once in a rank, such as rendezvous, first step and checkpoints.

Owns what each kind of mark changes. The attempt is locked, so no mark is taken of one that is being lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.clock import Clock
from phalanx_server.actions.record_profile_mark import record_profile_mark
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.messages import Mark, plain
from phalanx_server.domain.metric import clean_step
from phalanx_server.store.attempts import (
    Checkpoint,
    Fence,
    Milestones,
    nodes_of_ranks,
    reach_milestones,
    register_checkpoint,
)
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.metrics import Progress, upsert_progress

# It is part of a key, and an entry of an index holds no more than 2,704 bytes.
URL_MAX_BYTES = 2048
NOTE_MAX_CHARS = 500
NOTES_PER_REPORT = 20  # of each kind: the last, which say why an attempt ended
CHECK_CHARS = 32

OF_NODES = frozenset({"hang", "straggler", "corruption", "gpu", "preflight"})
"""The checks that say something of the node of the rank that is to blame."""

_MILESTONES = {"rendezvous": EventKind.RENDEZVOUS, "first_step": EventKind.FIRST_STEP}
_SENTENCES = {
    EventKind.RENDEZVOUS: "The process group is up.",
    EventKind.FIRST_STEP: "The first optimizer step is done.",
}


async def record_marks(conn: AsyncConnection, fence: Fence, marks: Sequence[Mark], clock: Clock) -> None:
    """Store marks that the fence let through; kinds that a newer runner may know are passed over."""
    await _milestones(conn, fence, marks, clock)
    for mark in marks:
        if mark.kind == "checkpoint":
            await _checkpoint(conn, fence, mark, clock)
        elif mark.kind == "progress":
            await _total_steps(conn, fence, mark, clock)
        elif mark.kind == "profile":
            await record_profile_mark(conn, fence, mark, clock.now)
    await _health(conn, fence, marks, clock)
    notes = [sentence for mark in marks if (sentence := _note(mark))][-NOTES_PER_REPORT:]
    await record_events(conn, [_event(fence, kind, text, clock, rank=rank) for kind, rank, text in notes])


async def _milestones(conn: AsyncConnection, fence: Fence, marks: Sequence[Mark], clock: Clock) -> None:
    """The time of a milestone is that of its last rank."""
    at = {
        kind: max((clock.time(mark.at, earliest=fence.created_at) for mark in marks if mark.kind == kind), default=None)
        for kind in _MILESTONES
    }
    finished = any(mark.kind == "finished" for mark in marks)
    if not finished and not any(at.values()):
        return
    reached = Milestones(rendezvous_at=at["rendezvous"], first_step_at=at["first_step"], finished_called=finished)
    before = await reach_milestones(conn, fence.id, reached)
    new = [kind for kind in _MILESTONES if at[kind] is not None and before[kind] is None]
    await record_events(conn, [_event(fence, _MILESTONES[kind], _SENTENCES[_MILESTONES[kind]], clock) for kind in new])


async def _checkpoint(conn: AsyncConnection, fence: Fence, mark: Mark, clock: Clock) -> None:
    """Register a checkpoint as complete; one without a usable url and step is passed over."""
    data = plain(mark.data)
    url, step = data.pop("url", None), data.pop("step", None)
    if not isinstance(url, str) or not 0 < len(url.encode()) <= URL_MAX_BYTES:
        return
    if not isinstance(step, int) or isinstance(step, bool) or clean_step(step) is None:
        return
    at = clock.time(mark.at, earliest=fence.created_at)
    checkpoint = Checkpoint(job_id=fence.job_id, attempt_id=fence.id, step=step, url=url, data=data, registered_at=at)
    if await register_checkpoint(conn, checkpoint):
        event = _event(fence, EventKind.CHECKPOINT, f"Checkpoint of step {step}: {url}", clock, url=url, step=step)
        await record_events(conn, [event])


async def _total_steps(conn: AsyncConnection, fence: Fence, mark: Mark, clock: Clock) -> None:
    total = mark.data.get("total_steps")
    if isinstance(total, int) and not isinstance(total, bool) and clean_step(total) is not None:
        at = clock.time(mark.at, earliest=fence.created_at)
        progress = Progress(at=at, total_steps=total)
        await upsert_progress(conn, job_id=fence.job_id, attempt_id=fence.id, progress=progress)


async def _health(conn: AsyncConnection, fence: Fence, marks: Sequence[Mark], clock: Clock) -> None:
    """Tell what checks found. What speaks against the node of a rank is told of that node as well."""
    found = [plain(mark.data) for mark in marks if mark.kind == "health"][-NOTES_PER_REPORT:]
    if not found:
        return
    nodes = await nodes_of_ranks(conn, fence.id)
    for data in found:
        check, message = str(data.get("check") or "")[:CHECK_CHARS], str(data.get("message") or "a check failed")
        blamed = data["blamed"] if isinstance(data.get("blamed"), int) else None
        node_id = nodes.get(blamed) if check in OF_NODES and blamed is not None else None
        told = {"check": check, "action": str(data.get("action") or "warn")[:CHECK_CHARS], "blamed": blamed}
        event = _event(fence, EventKind.HEALTH, _sentence(message), clock, **told)
        await record_events(conn, [replace(event, node_id=node_id)])


def _note(mark: Mark) -> tuple[EventKind, int, str] | None:
    """The event, the rank and a sentence for the user, for marks that are told and change nothing."""
    data = plain(mark.data)
    if mark.kind in ("note", "environment") and data.get("message"):
        return EventKind(mark.kind), mark.rank, _sentence(str(data["message"]))
    if mark.kind == "oom":
        return EventKind.NOTE, mark.rank, _sentence(str(data.get("message") or f"rank {mark.rank} ran out of memory"))
    if mark.kind == "dropped":
        amount = f"{data.get('count', '?')} {data.get('what', 'messages')} ({data.get('bytes', '?')} bytes)"
        return EventKind.NOTE, mark.rank, _sentence(f"rank {mark.rank}: {amount} were dropped")
    return None


def _sentence(text: str) -> str:
    """As the other events are written."""
    text = text[:NOTE_MAX_CHARS]
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?", "…")) else ".")


def _event(fence: Fence, kind: EventKind, message: str, clock: Clock, **data: Any) -> Event:
    return Event(at=clock.now, kind=kind.value, message=message, job_id=fence.job_id, attempt_id=fence.id, data=data)
