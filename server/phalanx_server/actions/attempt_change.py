"""What becomes of one attempt and its job in a transaction: collected first, then written together.

Owns the steps of a locked attempt (gang ready, started, stopping, over), each with its job's state, event and notice;
`write` carries out any number of them with a few statements. Decides nothing: the table of ends is the domain's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.settle_dependents import settle_dependents
from phalanx_server.domain.attempt import (
    ATTEMPT_LIVE,
    GOES_ON,
    AttemptState,
    End,
    EndFacts,
    Outcome,
    RankEnd,
    StopCause,
)
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.job import TERMINAL, JobState, advance
from phalanx_server.domain.reason import HoldReason
from phalanx_server.domain.stop import GAVE_WAY
from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.store import ids
from phalanx_server.store.attempts import release, update_attempts, update_jobs
from phalanx_server.store.events import Event, record_events
from phalanx_server.store.holds import HoldRow, upsert_holds
from phalanx_server.store.outbox import Notice, post_notices
from phalanx_server.store.seats import read_seat
from phalanx_server.store.wakeups import notify

AVOID_NODES_MAX = 16
REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class StopOrder:
    """What is stored with an attempt that a plan stops (columns of `attempts`), and said with the event."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class AttemptChange:
    """One attempt, locked with its job (`row`, of store.attempts), and what changes. `now` is the server's clock."""

    row: Row[Any]
    now: datetime
    state: AttemptState = field(init=False)
    job_state: JobState = field(init=False)
    attempt: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    released: bool = False
    kept: Seat | None = None  # where the job goes on

    def __post_init__(self) -> None:
        self.state = AttemptState(self.row.state)
        self.job_state = JobState(self.row.job_state)

    @property
    def live(self) -> bool:
        return self.state in ATTEMPT_LIVE

    def get(self, column: str) -> Any:
        """A column of the attempt, as it is with the changes so far."""
        return self.attempt[column] if column in self.attempt else getattr(self.row, column)

    def gang_ready(self, at: datetime) -> None:
        if self.live and self.get("gang_ready_at") is None:
            self.attempt["gang_ready_at"] = at
            self._event(EventKind.GANG_READY, "The GPUs of the gang are taken.", at)

    def started(self, at: datetime, ranks: Sequence[dict[str, Any]]) -> None:
        """Every rank runs."""
        if not self.live or self.get("started_at") is not None:
            return
        self.attempt |= {"started_at": at, "ranks": list(ranks)}
        if self.state is AttemptState.STARTING:
            self.state = AttemptState.RUNNING
            counted = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
            self._enter(JobState.RUNNING, f"Attempt {self.row.number} runs with {counted}.", at)
        else:
            self.job["state"] = self.job_state.value  # a pass reads an attempt again when its job's row has changed

    def stop(self, cause: StopCause, *, grace_s: float, message: str, order: StopOrder | None = None) -> None:
        """The attempt shall end. An earlier cause stays, unless it is overruled by a cancel: then the job goes on
        nowhere."""
        if not self.live or (self.state is AttemptState.STOPPING and cause is not StopCause.CANCEL):
            return
        if self.get("stop_cause") == cause:
            return
        first = self.state is not AttemptState.STOPPING
        self.attempt |= {"stop_cause": cause.value, "grace_s": grace_s, "next": None}
        if first:
            order = order or StopOrder()
            self.attempt |= {"stop_requested_at": self.now, **order.columns}
            self.state = AttemptState.STOPPING
            self._enter(JobState.STOPPING, message, self.now, cause=cause.value, **order.data)

    def end(self, end: End, *, at: datetime, exits: Sequence[dict[str, Any]] = (), avoid: UUID | None = None) -> None:
        """Every rank is gone, on every node: all that it held is free."""
        self.state = AttemptState.ENDED
        self.released = True
        if end.outcome in GOES_ON and end.job_state is JobState.QUEUED:
            self.kept = read_seat(self.get("next"))
        self._over(end, outcome=end.outcome, at=at, exits=exits)
        self._leave(end, backoff_until=_after(self.now, end.backoff_s), avoid=avoid)

    def lose(self, end: End, *, message: str, certain_at: datetime, backoff_until: datetime | None) -> None:
        """Nobody knows whether its ranks still run: it holds what it held until they are known to be gone, and counts
        against the quota until they have certainly ended by themselves."""
        self.state = AttemptState.LOST
        self._over(end, outcome=Outcome.NODE_LOST, at=self.now, exits=())
        self.attempt |= {"message": message, "certain_at": certain_at, "next": None}
        self._leave(end, backoff_until=backoff_until, avoid=None)

    def end_facts(self, *, at: datetime, default_cause: StopCause | None = None) -> EndFacts:
        """What `decide_end` needs to know of an end at this time and the database does; a caller adds what it saw of
        the end."""
        retries = self.row.spec["retries"]
        cause = self.get("stop_cause")
        return EndFacts(
            cause=StopCause(cause) if cause else default_cause,
            cancel_requested=self.row.cancel_requested_at is not None,
            finished_called=self.row.finished_called,
            number=self.row.number,
            failures=self.row.failures,
            max_retries=retries["max"],
            backoff_s=retries["backoff"],
            gave_way=GAVE_WAY.get(self.row.stop_reason, ""),
            time_left_s=self._time_left_s(at),
        )

    def _time_left_s(self, at: datetime) -> float | None:
        """Of the job's own limit. That of the policy is for the loop that enforces limits."""
        limit_s, started_at = self.row.spec["time_limit"], self.get("started_at")
        if limit_s is None:
            return None
        ran_s = (at - started_at).total_seconds() if started_at is not None else 0.0
        return limit_s - (self.row.done_s or 0.0) - ran_s

    def _over(self, end: End, *, outcome: Outcome, at: datetime, exits: Sequence[dict[str, Any]]) -> None:
        self.attempt |= {"outcome": outcome.value, "message": end.message, "ended_at": at, "exits": list(exits)}
        kind = EventKind.ATTEMPT_LOST if self.state is AttemptState.LOST else EventKind.ATTEMPT_ENDED
        message = f"Attempt {self.row.number} is over: {end.message}."
        ranks = {"failed_rank": end.failed_rank, "named_rank": end.named_rank}
        self._event(kind, message, at, outcome=outcome.value, **ranks)

    def _leave(self, end: End, *, backoff_until: datetime | None, avoid: UUID | None) -> None:
        self.job |= {"reason": end.reason.value, "message": end.message}
        if end.counts_as_failure:
            self.job["failures"] = self.row.failures + 1
        if end.job_state in TERMINAL:
            self.job["finished_at"] = self.now
        else:
            self.job |= {"queued_at": self.now, "backoff_until": backoff_until}
            if end.avoid_node and avoid is not None:
                others = [node for node in self.row.avoid_nodes if node != avoid]
                self.job["avoid_nodes"] = [*others, avoid][-AVOID_NODES_MAX:]
        self._enter(end.job_state, self._sentence(end), self.now)

    def _sentence(self, end: End) -> str:
        again = " It goes on where its place is kept." if self.kept else " It is queued again."
        return f"{end.message[:1].upper()}{end.message[1:]}.{again if end.job_state is JobState.QUEUED else ''}"

    def _enter(self, state: JobState, message: str, at: datetime, **data: Any) -> None:
        self.attempt["state"] = self.state.value
        self.job_state = advance(self.job_state, state)
        self.job["state"] = state.value
        if state is JobState.RUNNING and self.row.job_started_at is None:
            self.job["started_at"] = at
        self._event(EventKind(state), message, at, **data)
        self._notice(state, message)

    def _event(self, kind: EventKind, message: str, at: datetime, **data: Any) -> None:
        data |= {"attempt": self.row.number}
        event = Event(
            at=at, kind=kind.value, message=message, job_id=self.row.job_id, attempt_id=self.row.id, data=data
        )
        self.events.append(event)

    def _notice(self, state: JobState, message: str) -> None:
        payload = {
            "job_id": ids.encode("job", self.row.job_id),
            "name": self.row.job_name,
            "tenant": self.row.tenant,
            "state": state.value,
            "attempt": self.row.number,
            "message": message,
            "at": self.now.isoformat().replace("+00:00", "Z"),
        }
        self.notices.append(Notice(f"job.{state.value}", payload))


def rank_ends(exits: Sequence[Any]) -> list[RankEnd]:
    """Reported exits as the table of ends takes them."""
    return [
        RankEnd(
            rank=each.rank,
            exit_code=each.exit_code,
            signal=each.signal,
            oom=each.oom,
            finished=each.finished,
            reason=each.reason[:REASON_CHARS],
            before_stop=each.before_stop,
            fault=each.fault,
            final=each.final,
        )
        for each in exits
    ]


def _after(now: datetime, delay_s: float) -> datetime | None:
    return now + timedelta(seconds=delay_s) if delay_s else None


def _going_on(change: AttemptChange) -> HoldRow:
    """Until the next pass starts it there, which honours what is kept before all else."""
    message = "its ranks have stopped, and its next place is kept for it"
    return HoldRow(change.row.job_id, HoldReason.VICTIMS.value, message, (), None, change.kept)


async def write(conn: AsyncConnection, changes: Sequence[AttemptChange], *, now: datetime) -> None:
    """Write all that was collected, and wake whom it concerns."""
    changed = [change for change in changes if change.attempt or change.job]
    if not changed:
        return
    await update_jobs(conn, [{"id": c.row.job_id} | c.job for c in changed if c.job])
    await update_attempts(conn, [{"id": c.row.id} | c.attempt for c in changed if c.attempt])
    await release(conn, [c.row.id for c in changed if c.released], now=now)
    await upsert_holds(conn, [_going_on(c) for c in changed if c.kept], now=now)
    await record_events(conn, [event for change in changed for event in change.events])
    await post_notices(conn, [notice for change in changed for notice in change.notices], now=now)
    await settle_dependents(conn, [c.row.job_id for c in changed if c.job and c.job_state in TERMINAL], now=now)
    topics = [f"job:{change.row.job_id.hex}" for change in changed]
    topics += [f"desired:{change.row.cluster_id.hex}" for change in changed]
    await notify(conn, *topics, *(["queue"] if any(change.job for change in changed) else []))
