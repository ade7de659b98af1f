"""What a job is told that gives way: to whom, why, at what cost, and where it goes on."""

import pytest
from phalanx_server.domain.attempt import EndFacts, RankEnd, StopCause, decide_end
from phalanx_server.domain.job import JobState
from phalanx_server.domain.stop import GAVE_WAY, GivingWay, StopReason, cause_of

END = "; its ranks are being ended."
SENTENCES = {
    "Gives way to a, whose tenant may borrow before it; 9 GPU-seconds of work that no checkpoint holds are lost": {
        "cause": StopCause.PREEMPTION,
        "whom": "a",
        "reason": "reclaim_while_borrowing",
        "lost_gpu_s": 9.4,
    },
    "Gives way to big, because of a rule to come; nothing of its work is lost": {
        "cause": StopCause.PREEMPTION,
        "whom": "big",
        "reason": "because of a rule to come",
    },
    "Gives way to the maintenance of its node; nothing of its work is lost": {
        "cause": StopCause.DRAIN,
        "whom": None,
        "reason": "maintenance",
    },
    "Goes on with 1 replica instead of 4, so that big can start": {
        "cause": StopCause.RESIZE,
        "whom": "big",
        "replicas": 4,
        "next_replicas": 1,
    },
    "Goes on with 6 replicas instead of 4": {
        "cause": StopCause.RESIZE,
        "whom": None,
        "replicas": 4,
        "next_replicas": 6,
    },
    "Moves to a, b, c and 2 more": {
        "cause": StopCause.MIGRATION,
        "whom": None,
        "next_nodes": ("a", "b", "c", "d", "e"),
    },
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_one_sentence_says_it(sentence):
    assert GivingWay(**SENTENCES[sentence]).message() == sentence + END


@pytest.mark.parametrize("reason", StopReason)
def test_every_reason_says_how_it_ended(reason):
    end = decide_end(EndFacts(cause=cause_of(reason), exits=[RankEnd(rank=0, exit_code=0)], gave_way=GAVE_WAY[reason]))
    assert (end.message, end.job_state) == (GAVE_WAY[reason], JobState.QUEUED)
    done = decide_end(EndFacts(cause=cause_of(reason), finished_called=True, gave_way=GAVE_WAY[reason]))
    assert (done.message, done.job_state) == ("every rank ended well", JobState.SUCCEEDED)
