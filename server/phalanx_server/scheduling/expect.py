"""Owns the expected start of jobs that wait for room or quota: a look ahead at the running jobs' time limits.

Refuses to promise: jobs may end early, and nothing is reserved. The look goes a bounded way, so that it costs a pass
little: the next `MOST_ENDS` jobs to reach their limits, one after another, and the first `MOST_JOBS` waiting jobs, each
of which takes its place in the look as soon as it would start.
"""

from collections.abc import Sequence
from heapq import nsmallest

import numpy as np

from phalanx_server.domain.reason import Explanation, HoldReason
from phalanx_server.scheduling.draft import Book, Draft
from phalanx_server.scheduling.nodes import amounts_of
from phalanx_server.scheduling.order import Turn
from phalanx_server.scheduling.possible import options_of
from phalanx_server.scheduling.snapshot import Job
from phalanx_server.scheduling.world import World, states_of

MOST_ENDS = 32
MOST_JOBS = 8
_ENDS_HELP = {HoldReason.QUOTA, HoldReason.CAPACITY, HoldReason.FRAGMENTED, HoldReason.RESERVED}


def expected_starts(draft: Draft, waiting: Sequence[tuple[Turn, Explanation]]) -> dict[str, float]:
    """When jobs at the head of the queue could start, in Unix seconds, where time limits decide it."""
    ends = _next_ends(draft.world)
    if not ends:
        return {}
    book = Book(draft.soon.free, draft.soon.use, None)
    pending = _head_of_queue(waiting)
    expected: dict[str, float] = {}
    for at, job in ends:
        columns, amounts = draft.world.on_nodes(job, states_of(job))
        book.take(job.tenant, draft.world.demand(job, states_of(job)), columns, amounts, times=-1)
        for entry in list(pending):
            turn, waiting_job = entry
            if _takes_place(draft, book, turn):
                expected[waiting_job] = at
                pending.remove(entry)
        if not pending:
            break
    return expected


def _next_ends(world: World) -> list[tuple[float, Job]]:
    """Running jobs by the time at which their limit ends them; not before now."""
    return [(max(world.now, end), world.jobs[job_id]) for end, job_id in world.ends[:MOST_ENDS]]


def _head_of_queue(waiting: Sequence[tuple[Turn, Explanation]]) -> list[tuple[Turn, str]]:
    helped = [turn for turn, why in waiting if why.reason in _ENDS_HELP]
    first = nsmallest(MOST_JOBS, helped, key=lambda turn: turn.rank)
    return [(turn, job) for turn in first for job in turn.waiting[:MOST_JOBS]][:MOST_JOBS]


def _takes_place(draft: Draft, book: Book, turn: Turn) -> bool:
    """Whether a job of the class fits into the book; if so it is entered there."""
    key = turn.key
    for option in options_of(draft.world, turn.group):
        if book.use.shortage(key.tenant, option.demand) is not None:
            continue
        spot = draft.spot(key, option.gpu_type, (book,))
        if spot is not None and (key.ask.bound_to is None or len(spot.columns) == 1):
            amounts = np.outer(amounts_of(key.ask.shape), np.array(spot.replicas, dtype=np.int64))
            book.take(key.tenant, option.demand, spot.columns, amounts)
            return True
    return False
