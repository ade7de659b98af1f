"""An attempt's life, and the table of ends: what a cause and an exit make of the attempt and of its job.

Owns the states, the outcomes and the one decision `decide_end`. Facts come in, a decision goes out; refuses to know
where facts come from and how the decision is carried out.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from phalanx_server.domain.job import JobState
from phalanx_server.domain.retry import decide_retry


class AttemptState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"
    LOST = "lost"


_A = AttemptState
ATTEMPT_LIVE = frozenset({_A.STARTING, _A.RUNNING, _A.STOPPING})
ATTEMPT_TRANSITIONS: Mapping[AttemptState, frozenset[AttemptState]] = {
    _A.STARTING: frozenset({_A.RUNNING, _A.STOPPING, _A.ENDED, _A.LOST}),
    _A.RUNNING: frozenset({_A.STOPPING, _A.ENDED, _A.LOST}),
    _A.STOPPING: frozenset({_A.ENDED, _A.LOST}),
    _A.ENDED: frozenset(),
    _A.LOST: frozenset(),
}


class StopCause(StrEnum):
    """Why the server ended an attempt."""

    CANCEL = "cancel"
    TIME_LIMIT = "time_limit"
    PREEMPTION = "preemption"
    RESIZE = "resize"
    MIGRATION = "migration"
    DRAIN = "drain"
    REQUEUE = "requeue"
    NODE_LOST = "node_lost"


class Outcome(StrEnum):
    """How an attempt ended, for people and statistics."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    OOM = "oom"
    HUNG = "hung"
    UNHEALTHY = "unhealthy"
    START_FAILED = "start_failed"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"
    PREEMPTED = "preempted"
    RESIZED = "resized"
    MIGRATED = "migrated"
    DRAINED = "drained"
    REQUEUED = "requeued"
    NODE_LOST = "node_lost"


class Exit(StrEnum):
    """How the ranks of an attempt ended, all together."""

    CLEAN = "clean"  # every rank with code 0
    FAILED = "failed"  # some rank with another code, or by a signal
    OOM = "oom"  # some rank over the attempt's memory
    HUNG = "hung"  # it took no step any more
    UNHEALTHY = "unhealthy"  # a check found that going on would be in vain
    GIVEN_UP = "given_up"  # as those two, and the job wants no other try
    UNFIT_NODE = "unfit_node"  # before it began, one of its nodes did worse than the others
    UNSEEN = "unseen"  # nobody saw the end of some rank
    NEVER_RAN = "never_ran"
    NEVER_CAN = "never_can"  # it never ran, and another try would end the same


class Verdict(StrEnum):
    """What becomes of the job."""

    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    QUEUE = "queue"  # again, and no retry is used up
    PAUSE = "pause"  # again after the backoff and away from the node, and no retry is used up
    RETRY = "retry"  # again if a retry is left, else failed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How one rank ended; neither code nor signal = its end was never seen."""

    rank: int
    exit_code: int | None = None
    signal: int | None = None
    oom: bool = False
    finished: bool = False
    reason: str = ""  # of its node for ending it, in words that follow its name
    before_stop: bool = False  # it ended before its node was asked to stop it
    fault: str = ""  # `hang`, `health`, `preflight`
    final: bool = False  # after that fault the job shall not be tried again

    @property
    def unseen(self) -> bool:
        return self.exit_code is None and self.signal is None and not self.oom

    @property
    def failed(self) -> bool:
        return self.oom or self.signal is not None or bool(self.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndFacts:
    """All that the decision depends on. `failures` counts the job's failed attempts before this one."""

    cause: StopCause | None = None
    cancel_requested: bool = False
    exits: Sequence[RankEnd] = ()
    first_failed_rank: int | None = None
    finished_called: bool = False
    start_error: str | None = None  # it never ran, and this is why
    permanent: bool = False  # of the start error: another try would end the same
    number: int = 1  # of the attempt, from 1
    failures: int = 0
    max_retries: int = 0
    backoff_s: float = 30.0
    gave_way: str = ""  # to whom or what, in words, where the cause alone does not say
    time_left_s: float | None = None  # that all attempts leave of the job's time limit; None = it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The decision. `failed_rank` says whose node to avoid next time, `named_rank` of whom the message tells: another,
    where a rank stops itself for what another did. `backoff_s`: when to try again. `out_of_time`: the job would have
    been tried again, but nothing is left of its time limit."""

    outcome: Outcome
    job_state: JobState
    message: str
    counts_as_failure: bool = False
    backoff_s: float = 0.0
    avoid_node: bool = False
    failed_rank: int | None = None
    named_rank: int | None = None
    out_of_time: bool = False

    @property
    def reason(self) -> Outcome:
        """Why the job is in its state."""
        return Outcome.TIME_LIMIT if self.out_of_time else self.outcome


@dataclass(frozen=True, slots=True)
class EndRow:
    """One row of the table; the first that matches decides. `cause` None = it ended by itself; `exit` and `finished`
    None = whatever they are. `finished`: the job said so, or every rank ended well before it was asked to stop."""

    cause: StopCause | None
    exit: Exit | None
    finished: bool | None
    outcome: Outcome
    verdict: Verdict


_GIVES_WAY = {
    StopCause.PREEMPTION: Outcome.PREEMPTED,
    StopCause.RESIZE: Outcome.RESIZED,
    StopCause.MIGRATION: Outcome.MIGRATED,
    StopCause.DRAIN: Outcome.DRAINED,
    StopCause.REQUEUE: Outcome.REQUEUED,
}


OUT_OF_TIME = "nothing is left of its time limit"

BY_A_RANK = frozenset({Outcome.FAILED, Outcome.OOM, Outcome.HUNG, Outcome.UNHEALTHY})
"""Outcomes that came from a rank, which is known or not."""

GOES_ON = frozenset({Outcome.RESIZED, Outcome.MIGRATED})
"""Attempts after which the job goes on at a place that is kept for it."""


def _row(
    cause: StopCause | None,
    exit: Exit | None,
    outcome: Outcome,
    verdict: Verdict,
    *,
    finished: bool | None = None,
) -> EndRow:
    return EndRow(cause, exit, finished, outcome, verdict)


TABLE_OF_ENDS: tuple[EndRow, ...] = (
    _row(StopCause.CANCEL, None, Outcome.CANCELLED, Verdict.CANCEL),
    _row(StopCause.TIME_LIMIT, Exit.CLEAN, Outcome.SUCCEEDED, Verdict.SUCCEED),
    _row(StopCause.TIME_LIMIT, None, Outcome.TIME_LIMIT, Verdict.FAIL),
    _row(StopCause.NODE_LOST, None, Outcome.NODE_LOST, Verdict.QUEUE),
    *(_row(cause, None, Outcome.SUCCEEDED, Verdict.SUCCEED, finished=True) for cause in _GIVES_WAY),
    *(_row(cause, None, outcome, Verdict.QUEUE) for cause, outcome in _GIVES_WAY.items()),
    _row(None, Exit.CLEAN, Outcome.SUCCEEDED, Verdict.SUCCEED),
    _row(None, Exit.UNSEEN, Outcome.NODE_LOST, Verdict.PAUSE),
    _row(None, Exit.NEVER_RAN, Outcome.START_FAILED, Verdict.RETRY),
    _row(None, Exit.NEVER_CAN, Outcome.START_FAILED, Verdict.FAIL),
    _row(None, Exit.OOM, Outcome.OOM, Verdict.RETRY),
    _row(None, Exit.UNFIT_NODE, Outcome.UNHEALTHY, Verdict.PAUSE),
    _row(None, Exit.GIVEN_UP, Outcome.UNHEALTHY, Verdict.FAIL),
    _row(None, Exit.HUNG, Outcome.HUNG, Verdict.RETRY),
    _row(None, Exit.UNHEALTHY, Outcome.UNHEALTHY, Verdict.RETRY),
    _row(None, Exit.FAILED, Outcome.FAILED, Verdict.RETRY),
)

# So many attempts of a job may find a node unfit before that is taken for the job's own failure.
UNFIT_FREE = 20

# A start that fails is the cluster's fault more often than the job's: it is tried again even with `retries.max: 0`.
START_RETRIES = 3

_JOB_STATES = {
    Verdict.SUCCEED: JobState.SUCCEEDED,
    Verdict.FAIL: JobState.FAILED,
    Verdict.CANCEL: JobState.CANCELLED,
    Verdict.QUEUE: JobState.QUEUED,
    Verdict.PAUSE: JobState.QUEUED,
}


def decide_end(facts: EndFacts) -> End:
    """What an attempt's end means for it and for its job. A job is not tried again without time to run."""
    end = _by_table(facts)
    if end.outcome in BY_A_RANK and (named := _named(facts)) is not None:
        end = replace(end, named_rank=named.rank)
    if end.job_state is not JobState.QUEUED or facts.time_left_s is None or facts.time_left_s > 0:
        return end
    message = f"{end.message}, and {OUT_OF_TIME}"
    return replace(end, job_state=JobState.FAILED, message=message, out_of_time=True)


def _by_table(facts: EndFacts) -> End:
    exit = _exit_of(facts)
    if exit is Exit.UNFIT_NODE and facts.number > UNFIT_FREE:
        exit = Exit.UNHEALTHY
    row = _find(facts, exit)
    message = _message(facts, row.outcome)
    if row.verdict is Verdict.PAUSE:
        return _pause(facts, row.outcome, message)
    if row.verdict is not Verdict.RETRY:
        return End(outcome=row.outcome, job_state=_JOB_STATES[row.verdict], message=message)
    allowed = max(facts.max_retries, START_RETRIES) if exit is Exit.NEVER_RAN else facts.max_retries
    retry = decide_retry(failures=facts.failures + 1, max_retries=allowed, backoff_s=facts.backoff_s)
    failed_rank = facts.first_failed_rank if exit is Exit.HUNG else _blamed(facts)  # who waits is not to blame
    return End(
        outcome=row.outcome,
        job_state=JobState.QUEUED if retry.retry else JobState.FAILED,
        message=message,
        counts_as_failure=True,
        backoff_s=retry.delay_s,
        avoid_node=failed_rank is not None or exit is not Exit.HUNG,
        failed_rank=failed_rank,
    )


def _pause(facts: EndFacts, outcome: Outcome, message: str) -> End:
    """Nobody saw the job fail, so it is no failure; but a job that takes its runner with it must not do so again at
    once, and a node that is unfit is to be avoided."""
    unseen = min((each.rank for each in facts.exits if each.unseen), default=None)
    return End(
        outcome=outcome,
        job_state=_JOB_STATES[Verdict.PAUSE],
        message=message,
        backoff_s=facts.backoff_s,
        avoid_node=True,
        failed_rank=_blamed(facts) if unseen is None else unseen,
    )


def _find(facts: EndFacts, exit: Exit) -> EndRow:
    cause = StopCause.CANCEL if facts.cancel_requested else facts.cause
    was_done = exit is Exit.CLEAN and all(each.before_stop for each in facts.exits)
    finished = facts.finished_called or was_done or any(each.finished for each in facts.exits)
    for row in TABLE_OF_ENDS:
        if row.cause is cause and row.exit in (None, exit) and row.finished in (None, finished):
            return row
    raise AssertionError(f"the table of ends has no row for {cause} and {exit}")


_BY_FAULT = {"hang": Exit.HUNG, "preflight": Exit.UNFIT_NODE}


def _exit_of(facts: EndFacts) -> Exit:
    if facts.start_error is not None:
        return Exit.NEVER_CAN if facts.permanent else Exit.NEVER_RAN
    if any(each.oom for each in facts.exits):
        return Exit.OOM
    faults = [each for each in facts.exits if each.fault]
    if faults:
        return Exit.GIVEN_UP if any(each.final for each in faults) else _BY_FAULT.get(faults[0].fault, Exit.UNHEALTHY)
    if not facts.exits or any(each.unseen for each in facts.exits):
        return Exit.UNSEEN
    return Exit.FAILED if any(each.failed for each in facts.exits) else Exit.CLEAN


def _blamed(facts: EndFacts) -> int | None:
    """The rank that failed first, as far as anybody saw."""
    if facts.first_failed_rank is not None:
        return facts.first_failed_rank
    failed = [each.rank for each in facts.exits if each.failed]
    return min(failed, default=None)


_SENTENCES = {
    Outcome.SUCCEEDED: "every rank ended well",
    Outcome.CANCELLED: "cancelled",
    Outcome.TIME_LIMIT: "reached its time limit",
    Outcome.PREEMPTED: "gave way to another job",
    Outcome.RESIZED: "stopped to go on with another number of replicas",
    Outcome.MIGRATED: "stopped to go on elsewhere",
    Outcome.DRAINED: "its node is being drained",
    Outcome.REQUEUED: "was put back into the queue",
    Outcome.NODE_LOST: "a node was lost",
}


def _message(facts: EndFacts, outcome: Outcome) -> str:
    if outcome is Outcome.START_FAILED:
        return f"could not start: {facts.start_error}"
    if outcome is Outcome.NODE_LOST and facts.cause is None:
        return "nobody saw how it ended; treated as a lost node"
    if outcome in _GIVES_WAY.values() and facts.gave_way:
        return facts.gave_way
    if outcome in _SENTENCES:
        return _SENTENCES[outcome]
    named = _named(facts)
    faulty = next((each for each in facts.exits if each.fault), None)
    return f"the job {faulty.reason}" if named is None and faulty is not None else _describe(named)


def _named(facts: EndFacts) -> RankEnd | None:
    """The end that tells most of why the attempt failed; None where that is of no rank: in a hang all may only wait."""
    rank = _blamed(facts)
    blamed = next((each for each in facts.exits if each.rank == rank), None)
    faulty = next((each for each in facts.exits if each.fault), None)
    if faulty is not None and faulty.fault == "hang" and facts.first_failed_rank is None:
        return None
    return blamed if faulty is None or (blamed is not None and blamed.fault) else faulty


def _describe(end: RankEnd | None) -> str:
    if end is None:
        return "a rank failed"
    if end.reason:
        return f"rank {end.rank} {end.reason}"
    if end.oom:
        return f"rank {end.rank} ran out of memory"
    if end.signal is not None:
        return f"rank {end.rank} was ended by {_signal_name(end.signal)}"
    return f"rank {end.rank} exited with code {end.exit_code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
