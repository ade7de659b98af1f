"""Owns a plan in the making: what is still free, and what quotas still leave, after the decisions taken so far in a
pass, at every moment that matters.

Refuses to know whose turn it is and why a job has to wait. There is a book for each moment. *Now* is what is so, with
what was started. *Soon* is when all that is stopping has stopped, or goes on at its `next`, and what is kept for
waiting jobs is theirs. After that there is one for the start of each reservation. Whatever starts must be in order in
all of them up to its own end: so nothing that is kept or reserved is given away, at neither step of an eviction.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.evictable import Evictable
from phalanx_server.scheduling.fit import holds_gang, room, usable_by
from phalanx_server.scheduling.nodes import CPUS, GPUS, Amounts, Mask, Occupants, Windows, amounts_of, usable
from phalanx_server.scheduling.order import Ask, Bid, ClassKey, sized
from phalanx_server.scheduling.place import Spot, find_spot
from phalanx_server.scheduling.plan import Migration, Preemption, Resize, Start
from phalanx_server.scheduling.quota import QuotaUse
from phalanx_server.scheduling.snapshot import Job, Seat, spread
from phalanx_server.scheduling.world import Load, Running, World, states_of


class Book:
    """What is free on the nodes, what is used of the quotas, and who shares which node, at one moment."""

    __slots__ = ("at", "changes", "free", "occupants", "use")

    def __init__(self, at: float, free: Amounts, use: QuotaUse, occupants: Occupants | None) -> None:
        self.at = at
        self.changes = 0
        self.free = free
        self.use = use
        self.occupants = occupants

    def copy(self, at: float | None = None) -> "Book":
        """The same, to be changed apart from this one; of another moment, if one is given."""
        occupants = None if self.occupants is None else self.occupants.copy()
        return Book(self.at if at is None else at, self.free.copy(), self.use.copy(), occupants)

    def take(self, load: Load, times: int = 1) -> None:
        """Take what a job takes; `times` -1 gives it back."""
        self.changes += 1
        self.free[:, load.columns] -= times * load.amounts
        self.use.charge(load.tenant, load.demand, times)
        if self.occupants is not None:
            self.occupants.enter(load.account, load.columns, load.replicas, times=times)


Books = Sequence[Book]


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A waiting job's expected start, with what it will take then, and the book of that moment."""

    job: str
    load: Load
    starts_at: float
    ends_at: float
    book: Book


@dataclass(frozen=True, slots=True)
class Room:
    """How room is made for a waiting job: who gives up what, and the place that it gets."""

    spot: Spot
    evicted: tuple[tuple[Running, str], ...] = ()
    shrunk: tuple[tuple[Running, Seat], ...] = ()
    moved: tuple[tuple[Running, Seat], ...] = ()


@dataclass(slots=True)
class _Decisions:
    starts: list[Start] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    resizes: list[Resize] = field(default_factory=list)
    migrations: list[Migration] = field(default_factory=list)


class Draft:
    """The books of one pass over a world, which itself stays as it is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.table = world.table
        self.windows = Windows(world.maintenance, world.table, world.now)
        self.now = Book(world.now, world.free.copy(), world.use.copy(), self._who_is_where())
        self.leaving: dict[str, Job] = {id_: job for id_, job in world.stopping.items() if not world.is_on_lost(job)}
        """What is stopping. What is left on a lost node goes nowhere before the node is back."""
        self.soon = self._soon()
        self.later: list[Book] = []
        self.reservations: list[Reservation] = []
        self.array_jobs = Counter(world.array_jobs)
        self.decided = _Decisions()
        self.ahead: list[str] = []
        self.has_loosened = False
        self.version = 0
        """Grows whenever room is made or reserved: what was refused before may be different now."""
        self.even_protected = False
        """Look at those as well, for a moment, that are inside their minimum run time."""
        self.memo: dict[tuple[object, ...], Any] = {}
        """What others have worked out about the running jobs, until room is made."""
        self._memo_past_protection: dict[tuple[object, ...], Any] = {}
        self._evictable: dict[bool, Evictable] = {}
        self.stops_for: dict[str, set[str]] = {}
        """Who stops for whom."""
        for id_, job in self.leaving.items():
            if job.for_job is not None:
                self.stops_for.setdefault(job.for_job, set()).add(id_)
        self.disturbed: set[str] = set()
        self.relieved: list[str] = []
        """The tenants of those that were made to stop, one after the other: their use has become less."""
        self.ends: list[tuple[float, str]] = []
        """When what was started or kept in this pass is expected to end."""
        self.taken: dict[str, Load] = {}
        self.following: dict[str, Load] = {}
        """What jobs that shrink, grow or move will take."""
        self._clear: dict[float | None, Mask] = {}

    def _soon(self) -> Book:
        soon = self.now.copy()
        for job in self.leaving.values():
            soon.take(self.world.load(job, states_of(job)), -1)
            if job.next is not None:
                soon.take(self.world.load(job, [job.next]))
        return soon

    def _who_is_where(self) -> Occupants | None:
        if self.world.policy.share_nodes == "all":
            return None
        occupants = Occupants(len(self.table.names))
        for job in self.world.jobs.values():
            if job.state != "queued":
                load = self.world.load(job, states_of(job))
                occupants.enter(load.account, load.columns, load.replicas)
        return occupants

    # ------------------------------------------------------------------ what is free

    @property
    def now_and_soon(self) -> Books:
        """The books that every job must be in order in that starts now."""
        return (self.now, self.soon)

    def until(self, ends_at: float) -> list[Book]:
        """The books that a job must be in order in that starts now and ends then."""
        return [self.now, *self.soon_until(ends_at)]

    def soon_until(self, ends_at: float) -> list[Book]:
        """The same for one that starts as soon as what stops has stopped."""
        return [self.soon, *self.later[: bisect_left(self.later, ends_at, key=lambda book: book.at)]]

    def ends_at(self, bid: Bid, starts_at: float | None = None) -> float:
        """When a job would be expected to end."""
        return (self.world.now if starts_at is None else starts_at) + bid.run_s

    def account(self, key: ClassKey, job: str = "") -> str:
        """New jobs of one account may enter the same nodes."""
        return self.world.account(key.tenant, job)

    def accepting(self, key: ClassKey, books: Books) -> Mask:
        """The nodes that may take new jobs of this class, windows and room apart."""
        mask = self.world.empty.accepting(key.ask)
        for book in books:
            if book.occupants is not None:
                mask = mask & book.occupants.open_to(self.account(key))
        return mask

    def allowed(self, key: ClassKey, books: Books, at: float | None = None) -> Mask:
        """The nodes that may take new jobs of this class, now or at a later time, room apart."""
        limit_s = key.ask.run_limit_s
        if at is not None:
            return self.accepting(key, books) & self.windows.clear(limit_s, at=at)
        if limit_s not in self._clear:
            self._clear[limit_s] = self.windows.clear(limit_s)
        return self.accepting(key, books) & self._clear[limit_s]

    def usable(self, ask: Ask, books: Books) -> Amounts:
        """What replicas of an ask may take, in all of these books."""
        if ask.shape.is_cpu_only:
            return np.minimum.reduce([usable_by(book.free, self.table, ask) for book in books])
        return books[0].free if len(books) == 1 else np.minimum.reduce([book.free for book in books])

    def spot(
        self,
        key: ClassKey,
        gpu_type: str | None,
        books: Books,
        *,
        replicas: int | None = None,
        at: float | None = None,
    ) -> Spot | None:
        """Where a gang of this class would go by these books, now or at a later time."""
        free, allowed = self._fitting(key.ask, books, self.allowed(key, books, at))
        return find_spot(self.table, free, sized(key.ask, replicas), gpu_type, allowed)

    def may_hold(self, key: ClassKey, gpu_type: str | None) -> bool:
        """Do the nodes have room for the least that a job of this class asks for, now and soon?"""
        books = self.now_and_soon
        free, allowed = self._fitting(key.ask, books, self.allowed(key, books))
        return holds_gang(self.table, free, sized(key.ask, key.ask.least_replicas), gpu_type, allowed)

    def _fitting(self, ask: Ask, books: Books, allowed: Mask) -> tuple[Amounts, Mask]:
        """(`usable`, the allowed nodes on which a replica could stand by the first book): the amounts are right there,
        and elsewhere nothing, which is much quicker where most nodes are full. With a topology all of the allowed ones,
        for domains compare by all that they have."""
        shape, first = ask.shape, books[0].free
        row, each = (CPUS, shape.cpus) if shape.is_cpu_only else (GPUS, shape.gpus)
        fitting = allowed if ask.topology is not None or not each else allowed & (first[row] >= each)
        columns = np.flatnonzero(fitting)
        total = self.table.total[:, columns]
        free = usable(first[:, columns], total, by_cpu_jobs=shape.is_cpu_only)
        for book in books[1:]:
            more = usable(book.free[:, columns], total, by_cpu_jobs=shape.is_cpu_only)
            np.minimum(free, more, out=free)
        out = np.zeros_like(first)
        out[:, columns] = free
        return out, fitting

    def spot_at(self, seat: Seat, gpu_type: str | None) -> Spot | None:
        """The very place of a seat, if all its nodes exist."""
        columns, replicas = self.table.columns_of(spread(seat.placement))
        return Spot(gpu_type, columns, replicas) if len(columns) == len(spread(seat.placement)) else None

    def is_in_quota(self, tenant: str, demand: Demand, books: Books) -> bool:
        """Do the quotas leave a demand, by all of these books?"""
        for book in books:  # noqa: SIM110  (the hottest lines of a pass: no generator)
            if book.use.shortage(tenant, demand) is not None:
                return False
        return True

    def is_open(self, key: ClassKey, spot: Spot, books: Books) -> bool:
        """Could a gang start at this very place by these books, quotas included?"""
        if not self.is_in_quota(key.tenant, key.ask.shape.demand(spot.gpu_type, sum(spot.replicas)), books):
            return False
        counts = room(self.usable(key.ask, books)[:, spot.columns], key.ask.shape, sum(spot.replicas))
        return bool((counts * self.allowed(key, books)[spot.columns] >= spot.replicas).all())

    @property
    def evictable(self) -> Evictable:
        """Whom somebody might evict."""
        if self.even_protected not in self._evictable:
            self._evictable[self.even_protected] = Evictable(
                self.world, self.disturbed, even_protected=self.even_protected
            )
        return self._evictable[self.even_protected]

    @contextmanager
    def past_protection(self) -> Iterator[None]:
        """As if all minimum run times were over."""
        self.even_protected = True
        self.memo, self._memo_past_protection = self._memo_past_protection, self.memo
        try:
            yield
        finally:
            self.even_protected = False
            self.memo, self._memo_past_protection = self._memo_past_protection, self.memo

    # ------------------------------------------------------------------ what is decided

    def start(self, bid: Bid, spot: Spot) -> None:
        """Decide that the job starts there."""
        self._enter(bid, spot, self.until(self.ends_at(bid)))
        self.decided.starts.append(Start(bid.job, spot.gpu_type, sum(spot.replicas), spot.placement(self.table)))
        # Its GPUs no longer keep their share of CPUs, which may be more than it takes itself.
        self.has_loosened |= not bid.key.ask.shape.is_cpu_only

    def keep(self, bid: Bid, spot: Spot) -> None:
        """Decide that the job waits, and that this place is kept for it."""
        self._enter(bid, spot, self.soon_until(self.ends_at(bid)))
        self.ahead.append(bid.job)

    def _enter(self, bid: Bid, spot: Spot, books: Books) -> None:
        load = self.taken[bid.job] = self.load(bid.job, bid.key, spot)
        for book in books:
            book.take(load)
        insort(self.ends, (self.ends_at(bid), bid.job))
        if bid.key.gates.array is not None:
            self.array_jobs[bid.key.gates.array.id] += 1

    def load(self, job: str, key: ClassKey, spot: Spot) -> Load:
        """What a job of the class would take there."""
        amounts = np.outer(amounts_of(key.ask.shape), np.array(spot.replicas, dtype=np.int64))
        demand = key.ask.shape.demand(spot.gpu_type, sum(spot.replicas))
        return Load(key.tenant, self.account(key, job), demand, spot.columns, spot.replicas, amounts)

    def make(self, room: Room, for_job: str | None) -> None:
        """Decide who stops, shrinks and moves."""
        now, restart_s = self.world.now, self.world.policy.restart_s
        if for_job is not None:
            gone = {running.job.id for running, _ in (*room.evicted, *room.shrunk, *room.moved)}
            self.stops_for.setdefault(for_job, set()).update(gone)
        for victim, reason in room.evicted:
            self._leave(victim, None)
            lost_gpu_s = victim.loss(now, restart_s) - victim.gpus * restart_s
            self.decided.preemptions.append(Preemption(victim.job.id, for_job, reason, lost_gpu_s))
        for job, seat in room.shrunk:
            self._leave(job, seat)
            self.decided.resizes.append(Resize(job.job.id, for_job, seat.placed, seat.placement))
        for job, seat in room.moved:
            self._leave(job, seat)
            self.decided.migrations.append(Migration(job.job.id, for_job, seat.placement))
        self.version += 1
        self.memo.clear()
        self._memo_past_protection.clear()

    def _leave(self, running: Running, next_: Seat | None) -> None:
        """From now on it stops; until it is gone it takes the larger of what it has and what it will have."""
        job = running.job
        self.disturbed.add(job.id)
        self.relieved.append(job.tenant)
        for evictable in self._evictable.values():
            evictable.drop(running)
        self.leaving[job.id] = job
        for book in (self.soon, *self.overlapping(running)):
            book.take(running.load, -1)
        if next_ is None:
            return
        following = self.following[job.id] = self.world.load(job, [next_])
        for book in (self.soon, *self.overlapping(running)):
            book.take(following)
        both = self.world.load(job, [*states_of(job), next_])
        self.now.take(running.load, -1)
        self.now.take(both)

    def overlapping(self, running: Running) -> list[Book]:
        """The later books in which a running job still counts as running."""
        ends = self.world.expected_end(running.job)
        return [book for book in self.later if book.at < ends]

    def reserve(self, reservation: Reservation) -> None:
        """Reserve a start; its book is without it so far."""
        self.later.insert(bisect_left(self.later, reservation.starts_at, key=lambda b: b.at), reservation.book)
        for book in self.later:
            if reservation.starts_at <= book.at < reservation.ends_at:
                book.take(reservation.load)
        self.reservations.append(reservation)
        self.ahead.append(reservation.job)
        self.version += 1
