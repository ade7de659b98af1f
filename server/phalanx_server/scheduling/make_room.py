"""Owns how room is made for a job that does not fit: by moving others, then by shrinking them, then by evicting.

Refuses to decide whether it is worth it: a job whose turn it is and that is entitled to the room gets it. Each way is
tried for the first GPU type that the job accepts, then the next. Whatever is taken from others is the least that will
do: nobody who can be spared stops.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

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


def make_room(draft: Draft, bid: Bid, options: Sequence[Option], *, spare_protected: bool = True) -> Room | None:
    """The cheapest way to make room for a job, or None if there is none that it is entitled to."""
    for option in options:
        room = moves(draft, bid, option) if spare_protected and may_gather(draft, bid.key, option) else None
        room = room or _take(draft, bid, option, spare_protected=spare_protected)
        if room is not None:
            return room
    return None


def may_be_made(draft: Draft, bid: Bid, options: Sequence[Option]) -> bool:
    """Is it worth a try? False: it is not, for this job and those of its class that stand behind it."""
    gathers = draft.world.policy.consolidation
    for option in options:
        if (gathers and may_gather(draft, bid.key, option)) or is_promising(draft, bid, option):
            return True
    return False


def _take(draft: Draft, bid: Bid, option: Option, *, spare_protected: bool) -> Room | None:
    if not is_promising(draft, bid, option):
        return None
    trial = Trial(draft, bid, option)
    claim = Claim(trial, bid, spare_protected=spare_protected)
    for right in claim.rights():
        most = MOST_VICTIMS if spare_protected else MOST_PROTECTED
        pieces = islice(_pieces(trial, right.victims(), spare_protected=spare_protected), most)
        if trial.take_until_it_fits(pieces, right.ends_well):
            spot = trial.spot()
            assert spot is not None, "it fitted with what was taken"
            evicted = {piece.running.job.id: (piece.running, piece.reason) for piece in trial.taken if piece.reason}
            shrunk = _shrunk([piece for piece in trial.taken if not piece.reason], set(evicted))
            return Room(spot, tuple(evicted.values()), shrunk)
    return None


def _pieces(trial: Trial, victims: Iterator[Piece], *, spare_protected: bool) -> Iterator[Piece]:
    yield from spare_replicas(trial, spare_protected=spare_protected)
    yield from victims


def _shrunk(pieces: Sequence[Piece], evicted: set[str]) -> tuple[tuple[Running, Seat], ...]:
    given: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.running.job.id not in evicted:
            given.setdefault(piece.running.job.id, []).append(piece)
    return tuple((parts[0].running, seat_without(parts[0].running, parts)) for parts in given.values())
