"""The table of ends, row by row, with real processes: each case is a job that ends in one way, or is made to.

All run on one Phalanx, most at the same time. What nobody decides there yet (preemption, resize, migration) is asked
for by the server's own action on its database.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import phalanx
import psutil
import pytest
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.attempt import TABLE_OF_ENDS, EndRow, Exit, Outcome, StopCause
from phalanx_server.domain.job import JobState
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import create_engine
from sqlalchemy import text

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 90.0
JOB_STATES = {state.value for state in JobState}
GIVES_WAY = (StopCause.PREEMPTION, StopCause.RESIZE, StopCause.MIGRATION, StopCause.DRAIN, StopCause.REQUEUE)

# Does as its arguments say, in every attempt ("always") or the first alone: exits, or says why and exits, or eats
# memory, or takes no step any more, or waits for SIGTERM and then exits. Its first step says that it is ready for that.
RANK = """
import os, signal, sys, time
import phalanx
from phalanx import job

words = sys.argv[1:]
code = int(words[-1]) if words[-1].isdigit() else None

def end(*_):
    if "finished" in words:
        phalanx.finished()
    sys.exit(code)

if os.environ["PHALANX_ATTEMPT"] != "1" and "always" not in words:
    sys.exit(0)
if "wait" in words:
    if code is not None:
        signal.signal(signal.SIGTERM, end)
    phalanx.report(step=1)
    while True:
        time.sleep(0.1)
if "found" in words:
    check, action = words[-3:-1]
    job.mark("health", check=check, action=action, message=f"the check {check} failed", blamed=0)
if "hang" in words:
    for step in range(8):
        phalanx.report(step=step)
        time.sleep(0.05)
    while True:
        time.sleep(0.1)
if "grow" in words:
    eaten = bytearray(1500 << 20)
    while True:
        time.sleep(0.1)
sys.exit(code)
"""


class Stack:
    """The running Phalanx and its jobs, by the sentence of the case that each is for."""

    def __init__(self, up: Any) -> None:
        self.up = up
        self.client: phalanx.Client = up.client()
        self.url = EmbeddedPostgres(up.data / "postgres").url()
        self.workdir = up.data / "workdir"
        self.workdir.mkdir()
        (self.workdir / "rank.py").write_text(RANK)
        self.jobs: dict[str, str] = {}

    def submit(self, sentence: str, case: Case) -> None:
        document = {
            "name": "end",
            "tenant": "default",
            "resources": {"replicas": 1, "gpus_per_replica": 1} | case.resources,
            "run": {"command": f"python rank.py {case.words}"} | case.run,
            "retries": {"max": 0, "backoff": "1s"} | case.retries,
            "preemption": {"preemptible": case.cause is StopCause.DRAIN},
            **case.more,
        }
        self.jobs[sentence] = self.client.submit(document, workdir=self.workdir).id

    def wait_ready(self, sentence: str) -> None:
        """Until its rank has said that it waits."""

        def is_ready() -> bool:
            job = self.client.job(self.jobs[sentence])
            assert not job.ended, f"{sentence}: {job.state}, {job.message}"
            return bool(job.progress and job.progress.step)

        wait_for(is_ready, f"{sentence}: ready")

    def placed_on(self, sentence: str) -> str:
        return self.client.attempts(self.jobs[sentence])[0].placements[0].node

    def process(self, sentence: str) -> psutil.Process:
        return psutil.Process(self.client.attempts(self.jobs[sentence])[0].ranks[0].pid)

    def ask_to_stop(self, sentence: str, cause: StopCause) -> None:
        async def ask() -> None:
            engine = create_engine(self.url)
            try:
                async with engine.begin() as conn:
                    rows = await lock_live_attempts(conn, [ids.parse("job", self.jobs[sentence])])
                    assert await request_stop(conn, rows, cause=cause, now=datetime.now(UTC))
            finally:
                await engine.dispose()

        asyncio.run(ask())

    def avoided(self, job_id: str) -> set[str]:
        """Names of the nodes that the job avoids."""

        async def load() -> set[str]:
            engine = create_engine(self.url)
            try:
                async with engine.connect() as conn:
                    query = text("SELECT n.name FROM nodes n JOIN jobs j ON n.id = ANY(j.avoid_nodes) WHERE j.id = :id")
                    return set((await conn.execute(query, {"id": ids.parse("job", job_id)})).scalars())
            finally:
                await engine.dispose()

        return asyncio.run(load())


def wait_for(what: Callable[[], object], why: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline_s, f"{why}: not within {PATIENCE_S:g} s"
        time.sleep(0.1)


# ------------------------------------------------------------------ who ends it


def nobody(stack: Stack, sentence: str) -> None:
    """It ends by itself."""


def cancel(stack: Stack, sentence: str) -> None:
    stack.client.cancel(stack.jobs[sentence])


def server(cause: StopCause) -> Callable[[Stack, str], None]:
    return lambda stack, sentence: stack.ask_to_stop(sentence, cause)


def kill_runner(stack: Stack, sentence: str) -> None:
    next(each for each in stack.process(sentence).parents() if "NodeRunner" in " ".join(each.cmdline())).kill()


def kill_raylet(stack: Stack, sentence: str) -> None:
    name = f'"{stack.placed_on(sentence)}"'
    family = psutil.Process(stack.up.process.pid).children(recursive=True)
    next(each for each in family if each.name() == "raylet" and any(name in word for word in each.cmdline())).kill()


# ------------------------------------------------------------------ the cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """`cause`, `exit` and `finished` name the row; `state` is the job's right after its attempt number `attempt`."""

    words: str
    ended_by: Callable[[Stack, str], None] = nobody
    cause: StopCause | None = None
    exit: Exit
    finished: bool = False
    outcome: Outcome
    state: JobState
    message: str
    attempt: int = 1
    failures: int = 0
    avoids: bool = False
    alone: bool = False  # what ends it would end others too
    resources: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    retries: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> EndRow:
        """The first of the table that matches, as the domain looks it up."""
        return next(
            row
            for row in TABLE_OF_ENDS
            if row.cause is self.cause and row.exit in (None, self.exit) and row.finished in (None, self.finished)
        )


WORDS = {"wait 0": ("exits with 0", Exit.CLEAN), "wait": ("dies of SIGTERM", Exit.FAILED)}
SENTENCES_OF_WAY = {
    StopCause.PREEMPTION: (Outcome.PREEMPTED, "gave way to another job"),
    StopCause.RESIZE: (Outcome.RESIZED, "stopped to go on with another number of replicas"),
    StopCause.MIGRATION: (Outcome.MIGRATED, "stopped to go on elsewhere"),
    StopCause.DRAIN: (Outcome.DRAINED, "its node is being drained"),
    StopCause.REQUEUE: (Outcome.REQUEUED, "was put back into the queue"),
}


def gives_way(cause: StopCause) -> Iterator[tuple[str, Case]]:
    outcome, message = SENTENCES_OF_WAY[cause]
    ended_by = server(cause)
    for words, (how, exit) in WORDS.items():
        yield (
            f"{cause}, and it {how}: queued again",
            Case(
                words=words,
                ended_by=ended_by,
                cause=cause,
                exit=exit,
                outcome=outcome,
                state=JobState.QUEUED,
                message=message,
            ),
        )
    yield (
        f"{cause}, and it says that it is finished: succeeded",
        Case(
            words="wait finished 0",
            ended_by=ended_by,
            cause=cause,
            exit=Exit.CLEAN,
            finished=True,
            outcome=Outcome.SUCCEEDED,
            state=JobState.SUCCEEDED,
            message="every rank ended well",
        ),
    )


ENDS_ITSELF = {
    "it exits with 0: succeeded": Case(
        words="exit 0",
        exit=Exit.CLEAN,
        outcome=Outcome.SUCCEEDED,
        state=JobState.SUCCEEDED,
        message="every rank ended well",
    ),
    "it fails, and has a retry left: queued, away from that node": Case(
        words="exit 3",
        retries={"max": 1},
        exit=Exit.FAILED,
        outcome=Outcome.FAILED,
        state=JobState.QUEUED,
        message="rank 0 exited with code 3",
        failures=1,
        avoids=True,
    ),
    "it fails, and has no retry: failed": Case(
        words="exit 3",
        exit=Exit.FAILED,
        outcome=Outcome.FAILED,
        state=JobState.FAILED,
        message="rank 0 exited with code 3",
        failures=1,
    ),
    "it fails each time: failed when its retries are used up": Case(
        words="always exit 4",
        retries={"max": 1, "backoff": 0},
        exit=Exit.FAILED,
        outcome=Outcome.FAILED,
        state=JobState.FAILED,
        message="rank 0 exited with code 4",
        attempt=2,
        failures=2,
        avoids=True,
    ),
    "it takes more memory than it asked for: a failure like others": Case(
        words="grow",
        resources={"memory_per_replica": "700MiB"},
        retries={"max": 1},
        exit=Exit.OOM,
        outcome=Outcome.OOM,
        state=JobState.QUEUED,
        message="rank 0 ran out of memory: the limit is 700 MiB",
        failures=1,
        avoids=True,
    ),
    "it cannot be started: queued, away from that node, though it has no retries": Case(
        words="exit 0",
        retries={"backoff": 0},
        more={"checkpoint": {"url": "file:///proc/nowhere"}},
        exit=Exit.NEVER_RAN,
        outcome=Outcome.START_FAILED,
        state=JobState.QUEUED,
        message=r"could not start: cannot make the directories of the attempt: .*/proc/nowhere.*",
        failures=4,
        avoids=True,
    ),
    "it cannot be started four times: failed": Case(
        words="exit 0",
        retries={"backoff": 0},
        more={"checkpoint": {"url": "file:///proc/nowhere"}},
        exit=Exit.NEVER_RAN,
        outcome=Outcome.START_FAILED,
        state=JobState.FAILED,
        message=r"could not start: cannot make the directories of the attempt: .*/proc/nowhere.*",
        attempt=4,
        failures=4,
        avoids=True,
    ),
    "it can never be started: failed at once, retries or not": Case(
        words="exit 0",
        retries={"max": 3},
        run={"environment": {"requirements": ["--no-index", "phx-nosuch==1"]}},
        exit=Exit.NEVER_CAN,
        outcome=Outcome.START_FAILED,
        state=JobState.FAILED,
        message=r"could not start: .*No matching distribution found for phx-nosuch==1.*",
    ),
    "it takes no step any more, and has a retry left: queued": Case(
        words="hang",
        retries={"max": 1},
        more={"health": {"hang": {"action": "restart", "factor": 3, "at_least": "3s"}}},
        exit=Exit.HUNG,
        outcome=Outcome.HUNG,
        state=JobState.QUEUED,
        message=r"the job took no step for .*",
        failures=1,
    ),
    "a check of its own finds fault, and it has a retry left: queued, away from that node": Case(
        words="found nan restart 1",
        retries={"max": 1},
        exit=Exit.UNHEALTHY,
        outcome=Outcome.UNHEALTHY,
        state=JobState.QUEUED,
        message="rank 0 stopped itself: the check nan failed",
        failures=1,
        avoids=True,
    ),
    "a check of its own finds fault for good: failed, retries or not": Case(
        words="found nan stop 1",
        retries={"max": 3},
        exit=Exit.GIVEN_UP,
        outcome=Outcome.UNHEALTHY,
        state=JobState.FAILED,
        message="rank 0 stopped itself: the check nan failed",
    ),
    "its node is unfit: queued, away from that node, and no failure": Case(
        words="found preflight restart 1",
        more={"health": {"preflight": {"action": "replace", "factor": 1000}}},
        exit=Exit.UNFIT_NODE,
        outcome=Outcome.UNHEALTHY,
        state=JobState.QUEUED,
        message="rank 0 stopped itself: the check preflight failed",
        avoids=True,
    ),
    "nobody sees how it ends: queued, away from that node, and no failure": Case(
        words="wait",
        ended_by=kill_runner,
        alone=True,
        exit=Exit.UNSEEN,
        outcome=Outcome.NODE_LOST,
        state=JobState.QUEUED,
        message="nobody saw how it ended; treated as a lost node",
        avoids=True,
    ),
}

CASES: dict[str, Case] = {
    "cancel, and it exits with 0: cancelled": Case(
        words="wait 0",
        ended_by=cancel,
        cause=StopCause.CANCEL,
        exit=Exit.CLEAN,
        outcome=Outcome.CANCELLED,
        state=JobState.CANCELLED,
        message="cancelled",
    ),
    "cancel, and it fails: cancelled, retries or not": Case(
        words="wait 3",
        retries={"max": 3},
        ended_by=cancel,
        cause=StopCause.CANCEL,
        exit=Exit.FAILED,
        outcome=Outcome.CANCELLED,
        state=JobState.CANCELLED,
        message="cancelled",
    ),
    "time limit, and it exits with 0: succeeded": Case(
        words="wait 0",
        more={"time_limit": "5s"},
        cause=StopCause.TIME_LIMIT,
        exit=Exit.CLEAN,
        outcome=Outcome.SUCCEEDED,
        state=JobState.SUCCEEDED,
        message="every rank ended well",
    ),
    "time limit, and it dies of SIGTERM: failed, retries or not": Case(
        words="wait",
        retries={"max": 3},
        more={"time_limit": "5s"},
        cause=StopCause.TIME_LIMIT,
        exit=Exit.FAILED,
        outcome=Outcome.TIME_LIMIT,
        state=JobState.FAILED,
        message="reached its time limit",
    ),
    **dict(case for cause in GIVES_WAY for case in gives_way(cause)),
    "its node is lost: queued, and no node is avoided": Case(
        words="wait",
        ended_by=kill_raylet,
        alone=True,
        cause=StopCause.NODE_LOST,
        exit=Exit.UNSEEN,
        outcome=Outcome.NODE_LOST,
        state=JobState.QUEUED,
        message=r"node node-\d was lost",
    ),
    **ENDS_ITSELF,
}

# ------------------------------------------------------------------ driven


@dataclass(frozen=True)
class Told:
    """What the server says of a case in the end."""

    attempt: phalanx.models.Attempt
    state: str  # of the job, right after it
    job: phalanx.models.Job
    nodes: Sequence[str]  # by attempt
    avoided: set[str]


@pytest.fixture(scope="module")
def told(make_up: Callable[..., AbstractContextManager[Any]]) -> Iterator[dict[str, Told]]:
    with make_up(nodes=2, gpus_per_node=16) as up:
        stack = Stack(up)
        try:
            for part in at_the_same_time():
                drive(stack, part)
            yield {sentence: tell(stack, sentence, case) for sentence, case in CASES.items()}
        finally:
            stack.client.close()


def at_the_same_time() -> list[list[str]]:
    """Most cases; then, one by one, those that take their node from all."""
    alone = [sentence for sentence, case in CASES.items() if case.alone]
    most = [sentence for sentence in CASES if sentence not in alone]
    return [most, *([sentence] for sentence in alone)]


def drive(stack: Stack, sentences: Sequence[str]) -> None:
    """Run these jobs to their end, all at the same time."""
    for sentence in sentences:
        stack.submit(sentence, CASES[sentence])
    for sentence in sentences:
        if CASES[sentence].ended_by is not nobody:
            stack.wait_ready(sentence)
    for sentence in sentences:
        CASES[sentence].ended_by(stack, sentence)
    for sentence in sentences:
        wait_for(lambda sentence=sentence: is_over(stack, sentence), f"{sentence}: over")
    for sentence in sentences:
        stack.client.wait(stack.jobs[sentence], timeout_s=PATIENCE_S)


def is_over(stack: Stack, sentence: str) -> bool:
    return any(a.number == CASES[sentence].attempt and a.ended_at for a in stack.client.attempts(stack.jobs[sentence]))


def tell(stack: Stack, sentence: str, case: Case) -> Told:
    job_id = stack.jobs[sentence]
    attempts = sorted(stack.client.attempts(job_id), key=lambda attempt: attempt.number)
    attempt = attempts[case.attempt - 1]
    events = [event for event in stack.client.events(job_id) if event.attempt == attempt.id]
    over = next(i for i, event in enumerate(events) if event.kind in ("attempt_ended", "attempt_lost"))
    state = next(event.kind for event in events[over:] if event.kind in JOB_STATES)
    nodes = [each.placements[0].node for each in attempts]
    return Told(attempt, state, stack.client.job(job_id), nodes, stack.avoided(job_id))


FAULTS = {"hang": Exit.HUNG, "health": Exit.UNHEALTHY, "preflight": Exit.UNFIT_NODE}


def exit_of(attempt: phalanx.models.Attempt) -> Exit:
    """As its ranks' ends say."""
    (end,) = attempt.exits or [None]
    if attempt.outcome == Outcome.START_FAILED:
        return Exit.NEVER_CAN if "environment" in (attempt.message or "") else Exit.NEVER_RAN
    if end is None or (end.exit_code is None and end.signal is None and not end.oom):
        return Exit.UNSEEN
    if end.fault:
        return Exit.GIVEN_UP if end.final else FAULTS[end.fault]
    return Exit.OOM if end.oom else Exit.FAILED if end.exit_code or end.signal else Exit.CLEAN


@pytest.mark.parametrize("sentence", CASES)
def test_an_end(told: dict[str, Told], sentence: str) -> None:
    case, end = CASES[sentence], told[sentence]
    assert (end.attempt.outcome, end.state) == (case.outcome, case.state)
    assert re.fullmatch(case.message, end.attempt.message or "")
    asked = None if case.cause is StopCause.NODE_LOST else case.cause
    assert (end.attempt.stop_cause, exit_of(end.attempt)) == (asked, case.exit), "it ended as the case says"
    assert end.job.failures == case.failures
    assert end.avoided == (set(end.nodes[:-1]) if case.avoids else set())
    if case.state is JobState.QUEUED:
        assert end.job.attempts > case.attempt, "and it did start again"
    if case.avoids and case.outcome is not Outcome.START_FAILED:
        assert len(set(end.nodes)) == 2, "elsewhere"


def test_every_row_of_the_table_has_a_case() -> None:
    rows = [case.row for case in CASES.values()]
    assert [row for row in TABLE_OF_ENDS if row not in rows] == []
