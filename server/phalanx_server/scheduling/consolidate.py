"""Owns consolidation: which running jobs to move, as few as possible, so that a gang fits that would fit if what is
free lay together.

Refuses to stop anybody for good, and to touch quotas: a move costs a restart, and no replica. Single moves are all
tried before several at once; several are taken in the order of victims and then spared where they can be.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from phalanx_server.scheduling.draft import Books, Draft, Room
from phalanx_server.scheduling.order import Bid, sized
from phalanx_server.scheduling.place import Spot, find_spot
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.scheduling.trial import Piece, Trial
from phalanx_server.scheduling.world import Running

MOST_TRIED = 256
MOST_MOVED = 8


def moves(draft: Draft, bid: Bid, option: Option) -> Room | None:
    """The fewest moves that make room for a job; None if there are none, or `policy.consolidation` is
    off."""
    if not draft.world.policy.consolidation:
        return None
    trial = Trial(draft, bid, option)
    trial.look_ahead()
    if not trial.is_in_quota():
        return None
    candidates = list(islice(_candidates(trial), MOST_TRIED))
    for running in candidates:
        if (room := _moved(trial, [running])) is not None:
            return room
    return _several(trial, candidates)


def _candidates(trial: Trial) -> Iterator[Running]:
    """The jobs that may be moved and stand on nodes that the waiting job could use, in the order of victims."""
    draft = trial.draft
    now, restart_s = draft.world.now, draft.world.policy.restart_s
    wanted = draft.allowed(trial.key, trial.books)
    movable = [
        running
        for running in draft.world.running.values()
        if running.gpu_type == trial.option.gpu_type and wanted[running.load.columns].any() and may_move(draft, running)
    ]
    yield from sorted(
        movable, key=lambda r: (r.job.priority, r.loss(now, restart_s), -(r.job.started_at or 0), r.job.id)
    )


def may_move(draft: Draft, running: Running) -> bool:
    """Is it preemptible, outside its minimum run time, and left alone so far in this pass?"""
    is_free = running.job.id not in draft.disturbed and running.may_be_disturbed(draft.world.now)
    return is_free and running.job.preemptible and not draft.world.is_lost(running)


def _several(trial: Trial, candidates: Sequence[Running]) -> Room | None:
    chosen: list[Running] = []
    for running in candidates:
        chosen.append(running)
        room = _moved(trial, chosen) if len(chosen) > 1 else None
        if room is not None:
            return _sparing(trial, chosen) or room
        if len(chosen) >= MOST_MOVED:
            return None
    return None


def _sparing(trial: Trial, chosen: list[Running]) -> Room | None:
    best = None
    for running in reversed(list(chosen)):
        fewer = [r for r in chosen if r is not running]
        room = _moved(trial, fewer)
        if room is not None:
            best, chosen = room, fewer
    return best


def _moved(trial: Trial, chosen: Sequence[Running]) -> Room | None:
    """The room that these moves make, the largest job placed first; None if they make none, or one of the jobs would
    find no other place."""
    pieces = [Piece(r, r.load, "", trial.draft.world.expected_end(r.job)) for r in chosen]
    for piece in pieces:
        trial.lift(piece)
    added: list[Piece] = []
    try:
        spot = trial.spot()
        if spot is None:
            return None
        draft = trial.draft
        own = Piece(chosen[0], draft.load("", trial.key, spot))
        trial.lift(own, -1)
        added.append(own)
        seats = []
        for running in sorted(chosen, key=lambda r: (-r.gpus, r.job.id)):
            seat = elsewhere(trial, running)
            if seat is None:
                return None
            seats.append((running, seat))
            following = Piece(running, draft.world.load(running.job, [seat]), "", draft.world.expected_end(running.job))
            trial.lift(following, -1)
            added.append(following)
        return Room(spot, moved=tuple(seats))
    finally:
        for piece in reversed(added):
            trial.lift(piece)
        for piece in reversed(pieces):
            trial.lift(piece, -1)


def elsewhere(trial: Trial, running: Running) -> Seat | None:
    """Where a running job could go on by the books of the trial, in its cluster, or None. Its old place will do as
    little as any other that is taken."""
    draft = trial.draft
    spot = spot_for(draft, running, trial.books)
    return None if spot is None else Seat(gpu_type=running.gpu_type, placement=spot.placement(draft.table))


def spot_for(draft: Draft, running: Running, books: Books, *, replicas: int | None = None) -> Spot | None:
    """The best place for a running job with so many replicas, as many as it has if none are given."""
    job = running.job
    key = draft.world.queue.key_of(job)
    count = job.placed if replicas is None else replicas
    allowed = draft.allowed(key, books) & draft.table.in_cluster_of(running.load.columns)
    return find_spot(draft.table, draft.usable(key.ask, books), sized(key.ask, count), running.gpu_type, allowed)
