"""Owns reservations: the earliest moment at which a waiting job could run, as far as time limits and predictions tell.

Refuses to promise: jobs may end early, or outlive what was predicted. Between the jobs that hold something now and the
reservations made before, the look ahead goes from one expected end to the next, a bounded way. What is reserved binds
the pass: nothing may start that would still hold it then (backfilling as in EASY, Lifka 1995, with more than one
reservation as in Maui; with predictions as in Tsafrir, Etsion and Feitelson 2007).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from phalanx_server.domain.reason import HoldReason
from phalanx_server.scheduling.draft import Book, Draft, Reservation
from phalanx_server.scheduling.make_room import make_room
from phalanx_server.scheduling.order import Bid
from phalanx_server.scheduling.outlook import Outlook
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.possible import Option

MOST_RESERVATIONS = 16
NEXT_ENDS, MOST_ENDS = 256, 2048
"""So many ends are looked at first, and so many if that does not do."""
MOST_LOOKS = 256
WAITING_HELPS = {
    HoldReason.QUOTA,
    HoldReason.MAINTENANCE,
    HoldReason.CAPACITY,
    HoldReason.FRAGMENTED,
    HoldReason.TOPOLOGY,
    HoldReason.RESERVED,
}


@dataclass(frozen=True, slots=True)
class _Found:
    at: float
    book: Book
    spot: Spot


def reserve(draft: Draft, bid: Bid, options: Sequence[Option]) -> float | None:
    """Reserve the earliest start of a job; gives its time, None where nothing tells."""
    found = _earliest(draft, bid, options)
    if _first_unprotected(draft) < (inf if found is None else found.at):
        by_protection = _once_unprotected(draft, bid, options)
        if by_protection is not None and (found is None or by_protection.at < found.at):
            found = by_protection
    if found is None:
        return None
    load = draft.load(bid.job, bid.key, found.spot)
    draft.reserve(Reservation(bid.job, load, found.at, draft.ends_at(bid, found.at), found.book))
    return found.at


def _earliest(draft: Draft, bid: Bid, options: Sequence[Option]) -> _Found | None:
    looked_until = -inf
    for most_ends in (NEXT_ENDS, MOST_ENDS):
        outlook = Outlook(draft, most_ends)
        for at, book in _looks(draft, outlook, bid, options, looked_until):
            looked_until, spot = at, _spot_at(draft, bid, options, at, book)
            if spot is not None:
                return _Found(at, book, spot)
        if outlook.is_whole:
            break
    return None


def _looks(
    draft: Draft, outlook: Outlook, bid: Bid, options: Sequence[Option], after: float
) -> Iterator[tuple[float, Book]]:
    """The moments that are worth a look. Mostly the first at which enough is free will do. If not, then the first at
    which there would be a place if nothing were reserved, and a number of those after it. (A window may close a place
    again, and GPUs that become free keep CPUs from a CPU job: then there is no such first.)"""
    accepting = draft.accepting(bid.key, ())
    with_room = [outlook.moments_with_room(bid.key.ask, accepting & draft.table.of_type(o.gpu_type)) for o in options]
    moments = outlook.moments[np.unique(np.concatenate(with_room))]
    moments = moments[moments > after].tolist()
    if not moments:
        return
    yield moments[0], outlook.book(moments[0])

    def has_place(at: float) -> bool:
        return _spot_at(draft, bid, options, at, outlook.book(at, but_reserved=True), is_last=True) is not None

    only_opens = draft.windows.clear(None)[accepting].all() and not bid.key.ask.shape.is_cpu_only
    low = bisect_left(moments, True, lo=1, key=has_place) if only_opens else 1
    yield from outlook.books(moments[low : low + MOST_LOOKS])


def _spot_at(
    draft: Draft, bid: Bid, options: Sequence[Option], at: float, book: Book, *, is_last: bool = False
) -> Spot | None:
    """Where it would start at that moment; `is_last`: if nothing were reserved after it."""
    key, ends_at = bid.key, draft.ends_at(bid, at)
    books = [book] if is_last else [book, *(later for later in draft.later if at < later.at < ends_at)]
    replicas = key.ask.least_replicas
    for option in options:
        if draft.is_in_quota(key.tenant, option.least_demand, books):
            spot = draft.spot(key, option.gpu_type, books, replicas=replicas, at=at)
            if spot is not None:
                return spot
    return None


def _first_unprotected(draft: Draft) -> float:
    """When the first minimum run time is over; infinite if nobody is in one."""
    question = ("first unprotected",)
    if question not in draft.memo:
        ends = (r.job.protected_until for r in draft.world.running.values() if r.job.protected_until is not None)
        draft.memo[question] = min((at for at in ends if at > draft.world.now), default=inf)
    return float(draft.memo[question])


def _once_unprotected(draft: Draft, bid: Bid, options: Sequence[Option]) -> _Found | None:
    """When the minimum run times are over of those whom it could evict but for that."""
    now = draft.world.now
    with draft.past_protection():
        room = make_room(draft, bid, options)
    if room is None:
        return None
    given = [running for running, _ in (*room.evicted, *room.shrunk)]
    at = max((running.job.protected_until or now for running in given), default=now)
    if at <= now:
        return None
    book = _book_at(draft, at)
    for running, _ in room.evicted:
        if draft.world.expected_end(running.job) > at:
            book.take(running.load, -1)
    for running, seat in room.shrunk:
        if draft.world.expected_end(running.job) > at:
            book.take(running.load, -1)
            book.take(draft.world.load(running.job, [seat]))
    return _Found(at, book, room.spot)


def _book_at(draft: Draft, at: float) -> Book:
    outlook = Outlook(draft, NEXT_ENDS)
    if not outlook.is_whole and at > outlook.moments[-1]:
        outlook = Outlook(draft, MOST_ENDS)
    return outlook.book(at)
