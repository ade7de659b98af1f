"""What becomes of a profile, as tables: from what its ranks have said to what is told of the whole."""

from __future__ import annotations

import pytest
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.profile import (
    ENDED,
    JOB_TRACES_MAX_BYTES,
    TRACE_MAX_BYTES,
    UNDELIVERED,
    UNDELIVERED_S,
    UNHEARD,
    UNHEARD_S,
    ProfileState,
    RankState,
    check_trace_size,
    ranks_to_ask,
    settled,
    state_of,
)

ASKED, RECORDING, READY = (RankState(ProfileState(name)) for name in ("requested", "recording", "ready"))
BROKEN = RankState(ProfileState.FAILED, "why")

WHOLE = {
    "nobody has begun": ([ASKED, ASKED], ASKED),
    "one has begun": ([ASKED, RECORDING], RECORDING),
    "one is done, one has not begun": ([READY, ASKED], RECORDING),
    "one is done, one records": ([READY, RECORDING], RECORDING),
    "all are done": ([READY, READY], READY),
    "one failed, one records": ([BROKEN, RECORDING], RankState(ProfileState.RECORDING, "why")),
    "one failed, one is done": ([BROKEN, READY], RankState(ProfileState.READY, "why")),
    "all failed": ([BROKEN, BROKEN], BROKEN),
}


@pytest.mark.parametrize(("ranks", "whole"), WHOLE.values(), ids=WHOLE.keys())
def test_a_request_is_as_far_as_the_slowest_of_its_ranks(ranks: list[RankState], whole: RankState) -> None:
    assert state_of(ranks) == whole


SETTLED = {
    "asked a moment ago": (ASKED, True, 1.0, ASKED),
    "asked, and nothing heard": (ASKED, True, UNHEARD_S + 1, RankState(ProfileState.FAILED, UNHEARD)),
    "recording for as long as it may": (RECORDING, True, UNDELIVERED_S, RECORDING),
    "recording for ever": (RECORDING, True, UNDELIVERED_S + 1, RankState(ProfileState.FAILED, UNDELIVERED)),
    "recording when the attempt ended": (RECORDING, False, 1.0, RankState(ProfileState.FAILED, ENDED)),
    "done before the attempt ended": (READY, False, 10 * UNHEARD_S, READY),
    "failed before the attempt ended": (BROKEN, False, 1.0, BROKEN),
}


@pytest.mark.parametrize(("rank", "live", "age_s", "told"), SETTLED.values(), ids=SETTLED.keys())
def test_a_rank_that_says_no_more_has_failed(rank: RankState, live: bool, age_s: float, told: RankState) -> None:
    assert settled(rank, live=live, age_s=age_s) == told


def test_a_trace_is_taken_up_to_a_size_of_its_own_and_of_all_of_its_job() -> None:
    check_trace_size(TRACE_MAX_BYTES, others_bytes=JOB_TRACES_MAX_BYTES - TRACE_MAX_BYTES)
    with pytest.raises(Invalid, match=r"the trace has 2,147,483,649 bytes; at most 2,147,483,648: ask for fewer steps"):
        check_trace_size(TRACE_MAX_BYTES + 1, others_bytes=0)
    with pytest.raises(Invalid, match=r"with these 6 bytes the traces of the job would have 34,359,738,369; at most"):
        check_trace_size(6, others_bytes=JOB_TRACES_MAX_BYTES - 5)


def test_the_first_rank_of_each_node_is_asked_unless_others_are_named() -> None:
    assert ranks_to_ask(None, first_ranks=[8, 0], world_size=16) == [0, 8]
    assert ranks_to_ask(None, first_ranks=list(range(0, 160, 8)), world_size=160) == list(range(0, 64, 8))
    assert ranks_to_ask([3, 1, 3], first_ranks=[0], world_size=4) == [1, 3]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_not_there_is_refused_by_its_place(rank: int) -> None:
    with pytest.raises(Invalid, match=rf"ranks\[1\]: there is no rank {rank}; the job runs ranks 0 to 3"):
        ranks_to_ask([0, rank], first_ranks=[0], world_size=4)
