"""Owns reservations: the earliest moment at which a waiting job could run, as far as time limits and predictions tell.

Refuses to promise: jobs may end early, or outlive what was predicted. Between the jobs that hold something now and the
reservations made before, the look ahead goes from one expected end to the next, a bounded way. What is reserved binds
the pass: nothing may start that would still hold it then (backfilling as in EASY, Lifka 1995, with more than one
reservation as in Maui; with predictions as in Tsafrir, Etsion and Feitelson 2007).
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from phalanx_server.domain.reason import HoldReason
from phalanx_server.scheduling.draft import Book, Draft, Reservation
from phalanx_server.scheduling.make_room import make_room
from phalanx_server.scheduling.order import ClassKey
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.world import Load

MOST_RESERVATIONS = 16
MOST_ENDS = 2048
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


def reserve(draft: Draft, job: str, key: ClassKey, submitted_at: float, options: Sequence[Option]) -> float | None:
    """Reserve the earliest start of a job of the class; gives its time, None where nothing tells."""
    found = _earliest(draft, key, options)
    by_protection = _once_unprotected(draft, key, submitted_at, options)
    if by_protection is not None and (found is None or by_protection.at < found.at):
        found = by_protection
    if found is None:
        return None
    load = draft.load(job, key, found.spot)
    draft.reserve(Reservation(job, load, found.at, draft.ends_at(key, found.at), found.book))
    return found.at


def _earliest(draft: Draft, key: ClassKey, options: Sequence[Option]) -> _Found | None:
    for at, book in islice(_moments(draft), MOST_LOOKS):
        spot = _spot_at(draft, key, options, at, book)
        if spot is not None:
            return _Found(at, book.copy(at), spot)
    return None


def _spot_at(draft: Draft, key: ClassKey, options: Sequence[Option], at: float, book: Book) -> Spot | None:
    ends_at = draft.ends_at(key, at)
    books = [book, *(later for later in draft.later if at < later.at < ends_at)]
    replicas = key.ask.least_replicas
    for option in options:
        if draft.is_in_quota(key.tenant, key.ask.shape.demand(option.gpu_type, replicas), books):
            spot = draft.spot(key, option.gpu_type, books, replicas=replicas, at=at)
            if spot is not None:
                return spot
    return None


def _moments(draft: Draft) -> Iterator[tuple[float, Book]]:
    """Each moment at which something is expected to change, with the book of that moment, which is the same object."""
    book = draft.soon.copy()
    pending = list(_changes(draft))
    heapq.heapify(pending)
    while pending:
        at = pending[0][0]
        while pending and pending[0][0] <= at:
            _, _, _, load, times = heapq.heappop(pending)
            if load is not None:
                book.take(load, times)
        yield at, book


def _changes(draft: Draft) -> Iterator[tuple[float, int, str, Load | None, int]]:
    """(when, rank at that moment, whose, what changes, 1 to take or -1 to give back)."""
    world = draft.world
    for count, (at, id_) in enumerate(world.upcoming_ends()):
        if count >= MOST_ENDS:
            break
        if id_ in draft.following:
            yield at, 0, id_, draft.following[id_], -1
        elif id_ not in draft.disturbed:
            yield at, 0, id_, world.running[id_].load, -1
    for at, id_ in draft.ends:
        if at < float("inf"):
            yield at, 1, id_, draft.taken[id_], -1
    for r in draft.reservations:
        yield r.starts_at, 3, r.job, r.load, 1
        if r.ends_at < float("inf"):
            yield r.ends_at, 2, r.job, r.load, -1
    for at in draft.windows.ends:
        yield at, 4, "", None, 0


def _once_unprotected(draft: Draft, key: ClassKey, submitted_at: float, options: Sequence[Option]) -> _Found | None:
    """When the minimum run times are over of those whom it could evict but for that."""
    now = draft.world.now
    if not any(not running.may_be_disturbed(now) for running in draft.world.running.values()):
        return None
    draft.even_protected, memo, draft.memo = True, draft.memo, {}
    room = make_room(draft, key, submitted_at, options, spare_protected=False)
    draft.even_protected, draft.memo = False, memo
    if room is None:
        return None
    given = [running for running, _ in (*room.evicted, *room.shrunk)]
    at = max((running.job.protected_until or now for running in given), default=now)
    if at <= now:
        return None
    book = draft.soon.copy(at)
    for moment, passing in _moments(draft):
        if moment > at:
            break
        book = passing.copy(at)
    for running, _ in room.evicted:
        if draft.world.expected_end(running.job) > at:
            book.take(running.load, -1)
    for running, seat in room.shrunk:
        if draft.world.expected_end(running.job) > at:
            book.take(running.load, -1)
            book.take(draft.world.load(running.job, [seat]))
    return _Found(at, book, room.spot)
