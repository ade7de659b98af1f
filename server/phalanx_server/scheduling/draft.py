"""Owns a plan in the making: what is still free, and what quotas still leave, after the decisions taken so far in a
pass.

Refuses to know whose turn it is and why a job has to wait. There are two books. *Now* is what is so, with what was
started. *Soon* is when all that is stopping has stopped, or goes on at its `next`, and what is kept for waiting jobs
is theirs. Whatever starts must be in order in both: so nothing that is kept is given away, at neither step of an
eviction.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.fit import room, usable_by
from phalanx_server.scheduling.nodes import Amounts, Mask, Occupants, Windows, amounts_of
from phalanx_server.scheduling.order import Ask, ClassKey
from phalanx_server.scheduling.place import Spot, find_spot
from phalanx_server.scheduling.plan import Start
from phalanx_server.scheduling.quota import QuotaUse
from phalanx_server.scheduling.snapshot import Job, Seat, spread
from phalanx_server.scheduling.world import World, states_of


class Book:
    """What is free on the nodes, what is used of the quotas, and who shares which node, at one moment."""

    __slots__ = ("free", "occupants", "use")

    def __init__(self, free: Amounts, use: QuotaUse, occupants: Occupants | None) -> None:
        self.free = free.copy()
        self.use = use.copy()
        self.occupants = occupants

    def take(self, tenant: str, demand: Demand, columns: list[int], amounts: Amounts, *, times: int = 1) -> None:
        """Take so much on these nodes and of the tenant's quotas; `times` -1 gives it back."""
        self.free[:, columns] -= times * amounts
        self.use.charge(tenant, demand, times)


Books = Sequence[Book]


class Draft:
    """The books of one pass over a world, which itself stays as it is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.table = world.table
        self.windows = Windows(world.maintenance, world.table, world.now)
        self.now = Book(world.free, world.use, self._who_is_where(states_of))
        self.soon = self._soon()
        self.both = (self.now,) if self.soon is self.now else (self.now, self.soon)
        self._free_in_both: Amounts = np.minimum(self.now.free, self.soon.free)
        self.array_jobs = Counter(world.array_jobs)
        self.starts: list[Start] = []
        self.ahead: list[str] = []
        self.has_loosened = False
        self._clear: dict[float | None, Mask] = {}

    def _soon(self) -> Book:
        """Where nothing is stopping, soon is now, and nothing can be kept: a claim is met or has lapsed."""
        if not self.world.stopping:
            return self.now
        soon = Book(self.world.free, self.world.use, self._who_is_where(_states_soon))
        for job in self.world.stopping.values():
            for states, times in ((states_of(job), -1), (_states_soon(job), 1)):
                columns, amounts = self.world.on_nodes(job, states)
                soon.take(job.tenant, self.world.demand(job, states), columns, amounts, times=times)
        return soon

    def _who_is_where(self, states: Callable[[Job], list[Seat]]) -> Occupants | None:
        if self.world.policy.share_nodes == "all":
            return None
        occupants = Occupants(len(self.table.names))
        for job in self.world.jobs.values():
            if job.state != "queued":
                occupants.enter(self._account(job.tenant, job.id), self.world.on_nodes(job, states(job))[0])
        return occupants

    def _account(self, tenant: str, job: str = "") -> str:
        return job if self.world.policy.share_nodes == "none" else self.world.forest.branch(tenant)

    def account(self, key: ClassKey) -> str | None:
        """New jobs of one account may enter the same nodes; None = nodes are shared by all."""
        return None if self.now.occupants is None else self._account(key.tenant)

    def accepting(self, key: ClassKey, books: Books) -> Mask:
        """The nodes that may take new jobs of this class, windows and room apart."""
        mask = self.world.empty.accepting(key.ask)
        for book in books:
            if book.occupants is not None:
                mask = mask & book.occupants.open_to(self._account(key.tenant))
        return mask

    def allowed(self, key: ClassKey, books: Books) -> Mask:
        """The nodes that may take new jobs of this class, room apart."""
        limit_s = key.ask.run_limit_s
        if limit_s not in self._clear:
            self._clear[limit_s] = self.windows.clear(limit_s)
        return self.accepting(key, books) & self._clear[limit_s]

    def usable(self, ask: Ask, books: Books) -> Amounts:
        """What replicas of an ask may take, in all of these books."""
        return usable_by(self._free_in_both if books == self.both else books[0].free, self.table, ask)

    def spot(self, key: ClassKey, gpu_type: str | None, books: Books) -> Spot | None:
        """Where a gang of this class would go by these books."""
        return find_spot(self.table, self.usable(key.ask, books), key.ask, gpu_type, self.allowed(key, books))

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
        counts = room(self.usable(key.ask, books)[:, spot.columns], key.ask.shape, key.ask.replicas)
        return bool((counts * self.allowed(key, books)[spot.columns] >= spot.replicas).all())

    def start(self, job: str, key: ClassKey, spot: Spot) -> None:
        """Decide that the job starts there."""
        self._take(job, key, spot, self.both)
        self.starts.append(Start(job, spot.gpu_type, sum(spot.replicas), spot.placement(self.table)))
        # Its GPUs no longer keep their share of CPUs, which may be more than it takes itself.
        self.has_loosened |= not key.ask.shape.is_cpu_only

    def keep(self, job: str, key: ClassKey, spot: Spot) -> None:
        """Decide that the job waits, and that this place is kept for it."""
        self._take(job, key, spot, (self.soon,))
        self.ahead.append(job)

    def _take(self, job: str, key: ClassKey, spot: Spot, books: Books) -> None:
        columns = spot.columns
        amounts = np.outer(amounts_of(key.ask.shape), np.array(spot.replicas, dtype=np.int64))
        demand = key.ask.shape.demand(spot.gpu_type, sum(spot.replicas))
        for book in books:
            book.take(key.tenant, demand, columns, amounts)
            if book.occupants is not None:
                book.occupants.enter(self._account(key.tenant, job), columns)
        self._free_in_both[:, columns] = np.minimum(self.now.free[:, columns], self.soon.free[:, columns])
        if key.gates.array is not None:
            self.array_jobs[key.gates.array.id] += 1


def _states_soon(job: Job) -> list[Seat]:
    """What a job takes once all that is stopping has stopped."""
    if job.state != "stopping":
        return states_of(job)
    return [] if job.next is None else [job.next]
