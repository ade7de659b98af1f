"""Traces of a job's ranks that are asked for while it runs: their states, and which ranks are asked.

Owns what is made of what ranks have said so far: a rank that says no more has failed, and a request is as far as the
slowest of its ranks. And how large traces may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from phalanx_server.domain.errors import Invalid

STEPS_MAX = 100
STEPS = 5
RANKS_MAX = 64
DEFAULT_RANKS_MAX = 8
PROFILES_MAX = 100  # of one job
TRACE_MAX_BYTES = 2 << 30  # as on a node
JOB_TRACES_MAX_BYTES = 32 << 30  # together
UNHEARD_S = 900.0  # a node gives a rank 600 s for its next step, and says so
UNDELIVERED_S = 1800.0  # and then 420 s for its trace, which it tries to deliver for 600 s

ENDED = "The attempt ended before it was recorded."
UNHEARD = f"Nothing was heard of it for {UNHEARD_S / 60:.0f} minutes."
UNDELIVERED = f"Its trace has not come within {UNDELIVERED_S / 60:.0f} minutes."


class ProfileState(StrEnum):
    REQUESTED = "requested"
    RECORDING = "recording"
    READY = "ready"
    FAILED = "failed"


OPEN = frozenset({ProfileState.REQUESTED, ProfileState.RECORDING})


@dataclass(frozen=True, slots=True)
class RankState:
    """`reason` says why it failed."""

    state: ProfileState
    reason: str = ""


def settled(rank: RankState, *, live: bool, age_s: float) -> RankState:
    """The state of a rank as it is to be told; `live`: its attempt is, `age_s`: since it was asked."""
    if rank.state in OPEN and not live:
        return RankState(ProfileState.FAILED, ENDED)
    if rank.state is ProfileState.REQUESTED and age_s > UNHEARD_S:
        return RankState(ProfileState.FAILED, UNHEARD)
    if rank.state is ProfileState.RECORDING and age_s > UNDELIVERED_S:
        return RankState(ProfileState.FAILED, UNDELIVERED)
    return rank


def check_trace_size(size_bytes: int, *, others_bytes: int) -> None:
    """`others_bytes`: of all other traces of its job. Raises Invalid."""
    if size_bytes > TRACE_MAX_BYTES:
        raise Invalid.field(
            "", f"the trace has {size_bytes:,} bytes", f"at most {TRACE_MAX_BYTES:,}: ask for fewer steps"
        )
    if others_bytes + size_bytes > JOB_TRACES_MAX_BYTES:
        raise Invalid.field(
            "",
            f"with these {size_bytes:,} bytes the traces of the job would have {others_bytes + size_bytes:,}",
            f"at most {JOB_TRACES_MAX_BYTES:,}: ask for fewer steps or ranks",
        )


def state_of(ranks: Sequence[RankState]) -> RankState:
    """Of a request: `ready` once nothing more comes and there is a trace; the reason is the first that there is."""
    states = {rank.state for rank in ranks}
    reason = next((rank.reason for rank in ranks if rank.reason), "")
    if states <= {ProfileState.REQUESTED}:
        return RankState(ProfileState.REQUESTED)
    if states & OPEN:
        return RankState(ProfileState.RECORDING, reason)
    return RankState(ProfileState.READY if ProfileState.READY in states else ProfileState.FAILED, reason)


def ranks_to_ask(asked: Sequence[int] | None, *, first_ranks: Sequence[int], world_size: int) -> list[int]:
    """In order, each once. None asked for: the first of each node, of DEFAULT_RANKS_MAX nodes. Raises Invalid."""
    if asked is None:
        return sorted(first_ranks)[:DEFAULT_RANKS_MAX]
    for index, rank in enumerate(asked):
        if not 0 <= rank < world_size:
            raise Invalid.field(
                f"ranks[{index}]", f"there is no rank {rank}", f"the job runs ranks 0 to {world_size - 1}"
            )
    return sorted(set(asked))
