"""Owns what comes before anything else in a pass: places that are kept for waiting jobs, and what stops for them.

Refuses to stop anything. A queued job is a claimant if it carries `kept`, or if a stopping job is stopping `for` it.
It starts if its place is free; else, if the place will be free once all that is stopping has stopped, it waits and the
place stays its own; else what was kept has lapsed, and it takes its turn like any other job.
"""

import itertools

from phalanx_server.scheduling.decide import hold_for
from phalanx_server.scheduling.draft import Books, Draft
from phalanx_server.scheduling.gates import closed_gate
from phalanx_server.scheduling.order import Bid, ClassKey
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.plan import HoldGroup
from phalanx_server.scheduling.possible import possible_options
from phalanx_server.scheduling.snapshot import Job


def honour_claims(draft: Draft) -> list[tuple[Job, HoldGroup | None]]:
    """Settle the claimants in queue order. Gives those that are settled, with their hold or None for a start."""
    world = draft.world
    awaiting = {j.for_job for j in world.stopping.values() if j.for_job is not None}
    claimants = [world.jobs[i] for i in world.kept | awaiting if i in world.jobs and world.jobs[i].state == "queued"]
    settled = []
    for job in sorted(claimants, key=lambda j: (-j.priority, j.submitted_at, j.id)):
        bid = world.queue.bid_of(job)
        if closed_gate(bid.key.gates, world.now, draft.array_jobs) is not None:
            continue
        spot = _kept(draft, job, bid.key) or (_left(draft, bid.key) if job.id in awaiting else None)
        if spot is not None:
            settled.append((job, _settle(draft, bid, spot)))
    return settled


def _kept(draft: Draft, job: Job, key: ClassKey) -> Spot | None:
    """The very place that is kept for a claimant, if it is free soon."""
    if job.kept is None:
        return None
    spot = draft.spot_at(job.kept, draft.world.gpu_type_of(job, job.kept))
    return spot if spot is not None and draft.is_open(key, spot, (draft.soon,)) else None


def _left(draft: Draft, key: ClassKey) -> Spot | None:
    """Any place that a claimant has, or will have soon."""
    ways = itertools.product((draft.now_and_soon, (draft.soon,)), possible_options(draft.world, key))
    spots = (_spot_in_quota(draft, key, option.gpu_type, books) for books, option in ways)
    return next((spot for spot in spots if spot is not None), None)


def _spot_in_quota(draft: Draft, key: ClassKey, gpu_type: str | None, books: Books) -> Spot | None:
    spot = draft.spot(key, gpu_type, books, replicas=key.ask.least_replicas)
    return spot if spot is not None and draft.is_open(key, spot, books) else None


def _settle(draft: Draft, bid: Bid, spot: Spot) -> HoldGroup | None:
    if draft.is_open(bid.key, spot, draft.now_and_soon):
        draft.start(bid, spot)
        return None
    draft.keep(bid, spot)
    return hold_for(draft, bid.job, spot)
