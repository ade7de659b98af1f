"""How an attempt ends: each line of the design's table as a sentence."""

import itertools
from dataclasses import replace

import pytest
from phalanx_server.domain.attempt import UNFIT_FREE, EndFacts, Outcome, RankEnd, StopCause, decide_end
from phalanx_server.domain.job import JobState
from phalanx_server.domain.retry import BACKOFF_MAX_S, decide_retry

OK = RankEnd(rank=0, exit_code=0)
CRASH = RankEnd(rank=1, exit_code=3)
KILLED = RankEnd(rank=0, signal=15)
OOM = RankEnd(rank=2, oom=True, signal=9)
UNSEEN = RankEnd(rank=3)
HUNG = RankEnd(rank=1, signal=9, fault="hang", reason="took no step for 90 s, 30 times the median")
SICK = RankEnd(rank=1, exit_code=1, fault="health", reason="stopped itself: the loss of step 12 is NaN")
GIVEN_UP = replace(SICK, final=True)
UNFIT = RankEnd(rank=1, exit_code=1, fault="preflight", reason="is on a node that is slow")
DONE = RankEnd(rank=0, signal=15, finished=True)
STOPS = (StopCause.PREEMPTION, StopCause.RESIZE, StopCause.MIGRATION, StopCause.DRAIN, StopCause.REQUEUE)

SENTENCES = {
    "all ranks exit 0: succeeded": ({"exits": [OK]}, Outcome.SUCCEEDED, JobState.SUCCEEDED),
    "a crash without retries: failed": ({"exits": [OK, CRASH]}, Outcome.FAILED, JobState.FAILED),
    "a crash with a retry left: queued": ({"exits": [CRASH], "max_retries": 1}, Outcome.FAILED, JobState.QUEUED),
    "the last retry used up: failed": (
        {"exits": [CRASH], "max_retries": 1, "failures": 1},
        Outcome.FAILED,
        JobState.FAILED,
    ),
    "out of memory without retries: failed": ({"exits": [KILLED, OOM]}, Outcome.OOM, JobState.FAILED),
    "out of memory with a retry: queued": ({"exits": [OOM], "max_retries": 2}, Outcome.OOM, JobState.QUEUED),
    "hung without retries: failed": ({"exits": [KILLED, HUNG]}, Outcome.HUNG, JobState.FAILED),
    "hung with a retry: queued": ({"exits": [KILLED, HUNG], "max_retries": 1}, Outcome.HUNG, JobState.QUEUED),
    "a check that failed, without retries: failed": ({"exits": [SICK]}, Outcome.UNHEALTHY, JobState.FAILED),
    "a check that failed, with a retry: queued": (
        {"exits": [SICK, KILLED], "max_retries": 1},
        Outcome.UNHEALTHY,
        JobState.QUEUED,
    ),
    "a check after which no other try is wanted: failed, retries or not": (
        {"exits": [KILLED, GIVEN_UP], "max_retries": 5},
        Outcome.UNHEALTHY,
        JobState.FAILED,
    ),
    "a node that is unfit: queued, even without retries": ({"exits": [UNFIT]}, Outcome.UNHEALTHY, JobState.QUEUED),
    "cancel, whatever the exit: cancelled": (
        {"cause": StopCause.CANCEL, "exits": [OK]},
        Outcome.CANCELLED,
        JobState.CANCELLED,
    ),
    "a cancel that came while it was being preempted: cancelled": (
        {"cause": StopCause.PREEMPTION, "cancel_requested": True, "exits": [KILLED]},
        Outcome.CANCELLED,
        JobState.CANCELLED,
    ),
    "time limit: failed, retries or not": (
        {"cause": StopCause.TIME_LIMIT, "exits": [KILLED], "max_retries": 3},
        Outcome.TIME_LIMIT,
        JobState.FAILED,
    ),
    "time limit, but exit 0: succeeded": (
        {"cause": StopCause.TIME_LIMIT, "exits": [OK]},
        Outcome.SUCCEEDED,
        JobState.SUCCEEDED,
    ),
    "node lost: queued": ({"cause": StopCause.NODE_LOST, "exits": [CRASH]}, Outcome.NODE_LOST, JobState.QUEUED),
    "nobody saw the end: like a lost node": ({"exits": [OK, UNSEEN]}, Outcome.NODE_LOST, JobState.QUEUED),
    "nothing known at all: like a lost node": ({"exits": []}, Outcome.NODE_LOST, JobState.QUEUED),
    "it could not start: again, even without retries": (
        {"start_error": "no such bundle"},
        Outcome.START_FAILED,
        JobState.QUEUED,
    ),
    "it could not start and never can: failed at once, retries or not": (
        {"start_error": "no such package", "permanent": True, "max_retries": 5},
        Outcome.START_FAILED,
        JobState.FAILED,
    ),
    "it never can start, but gave way meanwhile: queued": (
        {"start_error": "no such package", "permanent": True, "cause": StopCause.PREEMPTION},
        Outcome.PREEMPTED,
        JobState.QUEUED,
    ),
    "preempted with time left: queued": (
        {"cause": StopCause.PREEMPTION, "exits": [KILLED], "time_left_s": 0.5},
        Outcome.PREEMPTED,
        JobState.QUEUED,
    ),
    "preempted with nothing left of its time limit: failed": (
        {"cause": StopCause.PREEMPTION, "exits": [OK], "time_left_s": 0.0},
        Outcome.PREEMPTED,
        JobState.FAILED,
    ),
    "preempted with nothing left, but it says that it is done: succeeded": (
        {"cause": StopCause.PREEMPTION, "exits": [DONE], "time_left_s": -3.0},
        Outcome.SUCCEEDED,
        JobState.SUCCEEDED,
    ),
    "a crash with a retry left, but no time: failed": (
        {"exits": [CRASH], "max_retries": 3, "time_left_s": -1.0},
        Outcome.FAILED,
        JobState.FAILED,
    ),
    "it could not start four times: failed": (
        {"start_error": "no such bundle", "failures": 3},
        Outcome.START_FAILED,
        JobState.FAILED,
    ),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_table_of_ends(sentence):
    facts, outcome, job_state = SENTENCES[sentence]
    end = decide_end(EndFacts(**facts))
    assert (end.outcome, end.job_state) == (outcome, job_state)


def test_a_job_without_time_left_fails_for_its_limit_whatever_ended_its_attempt():
    facts = EndFacts(cause=StopCause.PREEMPTION, exits=[KILLED], time_left_s=0.0)
    end = decide_end(facts)
    assert (end.outcome, end.reason) == (Outcome.PREEMPTED, Outcome.TIME_LIMIT)
    assert end.message == "gave way to another job, and nothing is left of its time limit"
    crash = decide_end(EndFacts(exits=[CRASH], max_retries=1, time_left_s=0.0))
    assert (crash.reason, crash.counts_as_failure) == (Outcome.TIME_LIMIT, True)
    final = decide_end(EndFacts(exits=[CRASH], time_left_s=0.0))
    assert final.reason == Outcome.FAILED, "it would have failed anyway"


@pytest.mark.parametrize("cause", STOPS)
def test_a_job_that_gives_way_is_queued_again_exit_0_included(cause):
    for exits in ([OK], [KILLED], [CRASH]):
        end = decide_end(EndFacts(cause=cause, exits=exits))
        assert end.job_state is JobState.QUEUED
        assert not end.counts_as_failure


@pytest.mark.parametrize("cause", STOPS)
def test_a_job_that_said_it_was_finished_has_succeeded(cause):
    assert decide_end(EndFacts(cause=cause, exits=[DONE])).job_state is JobState.SUCCEEDED
    assert decide_end(EndFacts(cause=cause, exits=[KILLED], finished_called=True)).job_state is JobState.SUCCEEDED


@pytest.mark.parametrize("cause", STOPS)
def test_a_job_that_was_done_before_it_was_asked_to_give_way_has_succeeded(cause):
    """Its output files were still being collected, say."""
    done, other = (RankEnd(rank=rank, exit_code=0, before_stop=True) for rank in range(2))
    assert decide_end(EndFacts(cause=cause, exits=[done, other])).job_state is JobState.SUCCEEDED
    for late in (RankEnd(rank=1, exit_code=0), RankEnd(rank=1, exit_code=3, before_stop=True), UNSEEN):
        assert decide_end(EndFacts(cause=cause, exits=[done, late])).job_state is JobState.QUEUED


def test_only_failures_use_up_retries_and_only_bad_ends_avoid_the_node():
    for cause, exits in itertools.product([None, *StopCause], ([OK], [CRASH], [OOM], [UNSEEN], [])):
        end = decide_end(EndFacts(cause=cause, exits=exits, max_retries=5))
        assert end.counts_as_failure == (cause is None and exits in ([CRASH], [OOM])), (cause, exits)
        assert end.avoid_node == (cause is None and exits != [OK]), (cause, exits)
        assert end.message


def test_an_end_that_nobody_saw_waits_the_plain_backoff_and_avoids_the_first_node_that_was_not_seen():
    """However often: a job that takes its runner with it each time must not start over in a hot loop."""
    exits = [KILLED, CRASH, RankEnd(rank=5), UNSEEN]
    end = decide_end(EndFacts(exits=exits, first_failed_rank=1, backoff_s=40, failures=7, max_retries=0))
    assert (end.job_state, end.counts_as_failure, end.backoff_s) == (JobState.QUEUED, False, 40)
    assert (end.avoid_node, end.failed_rank) == (True, 3)


def test_a_node_that_is_lost_keeps_its_own_rule():
    end = decide_end(EndFacts(cause=StopCause.NODE_LOST, exits=[UNSEEN]))
    assert (end.backoff_s, end.avoid_node, end.failed_rank) == (0, False, None)


@pytest.mark.parametrize(
    ("exits", "first", "rank", "message"),
    [
        ([CRASH], None, 1, "rank 1 exited with code 3"),
        ([KILLED, CRASH], 1, 1, "rank 1 exited with code 3"),
        ([KILLED], None, 0, "rank 0 was ended by SIGTERM"),
        ([OOM], None, 2, "rank 2 ran out of memory"),
        ([RankEnd(rank=0, signal=200)], None, 0, "rank 0 was ended by signal 200"),
    ],
)
def test_the_message_names_the_rank_that_failed_first(exits, first, rank, message):
    end = decide_end(EndFacts(exits=exits, first_failed_rank=first))
    assert (end.failed_rank, end.message) == (rank, message)


def test_retries_back_off_twice_as_long_each_time_up_to_an_hour():
    delays = [decide_retry(failures=n, max_retries=100, backoff_s=30).delay_s for n in (1, 2, 3, 50)]
    assert delays == [30, 60, 120, BACKOFF_MAX_S]
    assert not decide_retry(failures=1, max_retries=0, backoff_s=30).retry


def test_an_unfit_node_uses_up_no_retry_and_is_avoided() -> None:
    end = decide_end(EndFacts(exits=[OK, UNFIT], first_failed_rank=1, max_retries=0))
    assert (end.counts_as_failure, end.avoid_node, end.failed_rank) == (False, True, 1)
    often = decide_end(EndFacts(exits=[OK, UNFIT], first_failed_rank=1, max_retries=0, number=UNFIT_FREE + 1))
    assert (often.counts_as_failure, often.job_state) == (True, JobState.FAILED), "but not for ever"


def test_of_a_hang_only_a_rank_that_is_known_to_be_behind_is_to_blame() -> None:
    """All others only wait for it, wherever they are."""
    hung = [replace(HUNG, rank=0), HUNG]
    known = decide_end(EndFacts(exits=hung, first_failed_rank=1, max_retries=1))
    unknown = decide_end(EndFacts(exits=hung, first_failed_rank=None, max_retries=1))
    assert (known.avoid_node, known.failed_rank) == (True, 1)
    assert (unknown.avoid_node, unknown.failed_rank) == (False, None)
    assert known.message == "rank 1 took no step for 90 s, 30 times the median"
    assert unknown.message == "the job took no step for 90 s, 30 times the median"


def test_who_was_stopped_because_of_another_rank_is_not_why_an_attempt_ended() -> None:
    end = decide_end(EndFacts(exits=[KILLED, SICK], first_failed_rank=0, max_retries=0))
    assert end.message == "rank 1 stopped itself: the loss of step 12 is NaN"
    assert end.named_rank == 1, "what it wrote tells more"


def test_a_message_that_tells_of_no_rank_alone_names_none() -> None:
    hung = [replace(HUNG, rank=0), HUNG]
    assert decide_end(EndFacts(exits=hung)).named_rank is None
    assert decide_end(EndFacts(exits=hung, first_failed_rank=1)).named_rank == 1
    final = decide_end(EndFacts(exits=[replace(each, final=True) for each in hung]))
    assert (final.message, final.named_rank) == ("the job took no step for 90 s, 30 times the median", None)
    assert decide_end(EndFacts(cause=StopCause.TIME_LIMIT, exits=[CRASH])).named_rank is None


def test_a_rank_that_stops_the_job_for_good_is_named() -> None:
    assert decide_end(EndFacts(exits=[KILLED, GIVEN_UP], first_failed_rank=1)).named_rank == 1
