"""Ends jobs that wait: cancelled, or failed because nothing is left of their time limit.

Owns all that goes with it: what they wait for and why is forgotten, their events and notices are written, and those who
wait for them hear of it. Refuses to decide whom it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.settle_dependents import settle_dependents
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import JobState, advance
from phalanx_server.store.dependencies import forget_all
from phalanx_server.store.events import Event, record_alike
from phalanx_server.store.holds import delete_holds
from phalanx_server.store.jobs import LockedJob, change_jobs
from phalanx_server.store.outbox import post_notices, state_notice


@dataclass(frozen=True, slots=True)
class Ending:
    """How they end. `message` is a clause; `columns` are further columns of `jobs`."""

    state: JobState
    reason: str
    message: str
    columns: Mapping[str, Any] = field(default_factory=dict)


async def end_waiting(conn: AsyncConnection, jobs: Sequence[LockedJob], ending: Ending, *, now: datetime) -> list[UUID]:
    """End these jobs, which are locked and queued; their ids."""
    if not jobs:
        return []
    job_ids = [job.id for job in jobs]
    state, message = advance(JobState.QUEUED, ending.state), ending.message
    values = {"state": state, "finished_at": now, "reason": ending.reason, "message": message, "unmet": 0}
    await change_jobs(conn, job_ids, {**values, **ending.columns})
    await forget_all(conn, job_ids)
    await delete_holds(conn, job_ids)
    event = Event(at=now, kind=EventKind(state), message=f"{message[:1].upper()}{message[1:]}.")
    await record_alike(conn, job_ids, event)
    notices = [
        state_notice(j.id, name=j.name, tenant=j.tenant, state=state, attempt=j.attempts, message=message, now=now)
        for j in jobs
    ]
    await post_notices(conn, notices, now=now)
    await settle_dependents(conn, job_ids, now=now)
    return job_ids
