"""Asks the ranks of a running job for a trace of their next steps.

Owns what is refused. The agent hears of it with what it should run; ranks say themselves how far they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.open_jobs import open_jobs
from phalanx_server.domain.access import Actor
from phalanx_server.domain.attempt import AttemptState
from phalanx_server.domain.errors import Conflict
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.profile import (
    OPEN,
    PROFILES_MAX,
    UNDELIVERED,
    UNHEARD,
    ProfileState,
    RankState,
    ranks_to_ask,
    settled,
    state_of,
)
from phalanx_server.store import ids
from phalanx_server.store.attempts import load_groups, lock_live_attempts
from phalanx_server.store.audit import record_audit
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.profiles import NewProfile, close, create_profile, list_profiles
from phalanx_server.store.wakeups import notify

_SAID_RANKS = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """`ranks`: None for the first of each node."""

    steps: int
    ranks: Sequence[int] | None = None


async def request_profile(conn: AsyncConnection, job_id: UUID, wanted: Wanted, *, actor: Actor, now: datetime) -> UUID:
    """The id of the profile. Raises NotFound, Invalid for a rank that the job has not, and Conflict for a job that does
    not run, or of which a profile is being recorded. Runs in the caller's transaction."""
    name, (job,) = await open_jobs(conn, job_id)
    attempts = await lock_live_attempts(conn, [job_id])
    if not attempts or attempts[0].state != AttemptState.RUNNING:
        raise Conflict(f"{job.name} is {job.state}: only a job that runs can be profiled")
    (attempt,) = attempts
    groups = (await load_groups(conn, [attempt.id]))[attempt.id]
    first_ranks, world_size = [group.first_rank for group in groups], sum(group.ranks for group in groups)
    ranks = ranks_to_ask(wanted.ranks, first_ranks=first_ranks, world_size=world_size)
    await _make_room(conn, job.name, await list_profiles(conn, job_id), attempt.id, now)
    made = NewProfile(
        id=ids.new_id(),
        job_id=job_id,
        attempt_id=attempt.id,
        steps=wanted.steps,
        created_by=actor.name,
        created_at=now,
    )
    await create_profile(conn, made, ranks)
    message = f"{actor.name} asked for a profile of {wanted.steps} steps of {_in_words(ranks)}."
    event = Event(at=now, kind=EventKind.NOTE.value, message=message, job_id=job_id, attempt_id=attempt.id)
    await record_events(conn, [event])
    detail = {"profile": ids.encode("profile", made.id), "steps": wanted.steps, "ranks": ranks}
    await record_audit(conn, actor, "request_profile", name, detail)
    await notify(conn, f"desired:{attempt.cluster_id.hex}", f"job:{job_id.hex}")
    return made.id


async def _make_room(
    conn: AsyncConnection, job_name: str, before: Sequence[Row[Any]], attempt_id: UUID, now: datetime
) -> None:
    """One at a time: two would be in each other's traces. One that nothing is heard of is given up."""
    if len(before) >= PROFILES_MAX:
        raise Conflict(f"{job_name} has {PROFILES_MAX} profiles already, the most that one job may have")
    for row in before:
        if row.attempt_id != attempt_id or row.closed_at is not None:
            continue
        if profile_state(row, now=now).state in OPEN:
            raise Conflict(f"{ids.encode('profile', row.id)} of {job_name} is not done yet: ask again after it")
        is_recording = any(each["state"] == ProfileState.RECORDING for each in row.ranks)
        await close(conn, row.id, reason=UNDELIVERED if is_recording else UNHEARD, now=now)


def rank_states(row: Row[Any], *, now: datetime) -> list[RankState]:
    """Of the ranks of a profile (a row of `store.profiles`), as they are to be told."""
    age_s = (now - row.created_at).total_seconds()
    heard = [RankState(ProfileState(each["state"]), each["reason"]) for each in row.ranks]
    return [settled(each, live=row.live, age_s=age_s) for each in heard]


def profile_state(row: Row[Any], *, now: datetime) -> RankState:
    return state_of(rank_states(row, now=now))


def _in_words(ranks: Sequence[int]) -> str:
    said = ", ".join(str(rank) for rank in ranks[:_SAID_RANKS])
    more = f" and {len(ranks) - _SAID_RANKS} more" if len(ranks) > _SAID_RANKS else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {said}{more}"
