"""Owns how room is made for a job that does not fit: by moving others, then by shrinking them, then by evicting.

Refuses to decide whether it is worth it: a job whose turn it is and that is entitled to the room gets it. Each way is
tried for the first GPU type that the job accepts, then the next. Whatever is taken from others is the least that will
do: nobody who can be spared stops.
"""

from collections.abc import Sequence
from itertools import chain, islice

from phalanx_server.scheduling.consolidate import moves
from phalanx_server.scheduling.draft import Draft, Room
from phalanx_server.scheduling.elastic import seat_without, spare_replicas
from phalanx_server.scheduling.order import Bid
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.preempt import Claim
from phalanx_server.scheduling.prospects import is_promising, may_gather
from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.scheduling.trial import Piece, Trial
from phalanx_server.scheduling.world import Running

MOST_VICTIMS = 4096
"""So many running jobs are considered for one waiting job at most."""

MOST_PROTECTED = 64
"""And so many when it only looks ahead to the end of minimum run times."""


def make_room(draft: Draft, bid: Bid, options: Sequence[Option]) -> Room | None:
    """The cheapest way to make room for a job, or None if there is none that it is entitled to."""
    for option in options:
        is_apart = not draft.even_protected and may_gather(draft, bid.key, option)
        room = (moves(draft, bid, option) if is_apart else None) or _take(draft, bid, option)
        if room is not None:
            return room
    return None


def may_be_made(draft: Draft, bid: Bid, options: Sequence[Option]) -> bool:
    """Is it worth a try?"""
    gathers = draft.world.policy.consolidation
    for option in options:  # noqa: SIM110  (one of the hot places of a pass)
        if (gathers and may_gather(draft, bid.key, option)) or is_promising(draft, bid, option):
            return True
    return False


def _take(draft: Draft, bid: Bid, option: Option) -> Room | None:
    if not is_promising(draft, bid, option):
        return None
    trial = Trial(draft, bid, option)
    claim = Claim(trial, bid)
    for right in claim.rights():
        most = MOST_PROTECTED if draft.even_protected else MOST_VICTIMS
        pieces = islice(chain(spare_replicas(trial), right.victims()), most)
        if trial.take_until_it_fits(pieces, right.ends_well):
            spot = trial.spot()
            assert spot is not None, "it fitted with what was taken"
            evicted = {piece.running.job.id: (piece.running, piece.reason) for piece in trial.taken if piece.reason}
            shrunk = _shrunk([piece for piece in trial.taken if not piece.reason], set(evicted))
            return Room(spot, tuple(evicted.values()), shrunk)
    return None


def _shrunk(pieces: Sequence[Piece], evicted: set[str]) -> tuple[tuple[Running, Seat], ...]:
    given: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.running.job.id not in evicted:
            given.setdefault(piece.running.job.id, []).append(piece)
    return tuple((parts[0].running, seat_without(parts[0].running, parts)) for parts in given.values())
