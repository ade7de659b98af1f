"""Owns whom a waiting job may evict, in which order, and when that is allowed to happen at all.

Refuses to know where the job would go. There are three rights. *Nominal*: to one's own nominal quota and pools, at the
cost of whoever borrows them (`reclaim`), and of one's own lesser jobs (`within_tenant`). *Fair share*: to a share that
is no larger than what the victim's side keeps, or smaller than what it has. *Borrowing*: where the tenant's
`preemption.borrow` says so (`reclaim_while_borrowing`). They are tried in this order; nobody is evicted unless the job
fits afterwards. The rules are those of Kueue (pkg/scheduler/preemption), the two of fair share those of its
`LessThanOrEqualToFinalShare` and `LessThanInitialShare`.

No loops: a right to nominal quota is never turned against a tenant within its own; a fair share that was taken is no
larger than the one that is left, so that the victim, back in the queue, finds nobody above its own share.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property, partial

from phalanx_server.scheduling.evictable import Order
from phalanx_server.scheduling.order import Bid
from phalanx_server.scheduling.quota import QuotaUse
from phalanx_server.scheduling.snapshot import Job
from phalanx_server.scheduling.trial import Piece, Trial
from phalanx_server.scheduling.world import Running
from phalanx_server.scheduling.yielding import Place, places_of

WITHIN, RECLAIM, BORROWING, FAIR = "within_tenant", "reclaim", "reclaim_while_borrowing", "fair_share"


@dataclass(frozen=True, slots=True)
class Right:
    """One right of a waiting job: whom it lets it evict, in order, and what must hold once that is done."""

    victims: Callable[[], Iterator[Piece]]
    ends_well: Callable[[], bool]


class Claim:
    """The rights of one waiting job in a trial."""

    def __init__(self, trial: Trial, bid: Bid) -> None:
        self._trial, self._draft, self._bid = trial, trial.draft, bid
        self._evictable = trial.draft.evictable
        self._world, self._forest = trial.draft.world, trial.draft.world.forest
        self._tenant, self._priority = trial.key.tenant, trial.key.priority
        self._rules = self._forest.tenants[self._forest.number[self._tenant]].preemption
        self._me = self._forest.number[self._tenant]
        use = trial.book.use
        self._limited = [(r, n) for r, n in trial.demand if use.left(self._me, r) is not None]
        self._before = {(i, r): use.excess(i, r) for i in self._forest.way_up(self._tenant) for r, _ in self._limited}

    def rights(self) -> Iterator[Right]:
        """One after the other, the least costly to others first."""
        for sides in self._sides():
            yield Right(partial(self._by_nominal, sides), self._within_nominal)
        if self._limited and self._world.policy.fair_sharing:
            yield Right(self._by_fair_share, self._whatever)
        if self._limited and self._rules.borrow is not None:
            yield Right(self._by_borrowing, self._whatever)

    # ------------------------------------------------------------------ who may be evicted

    def _own(self) -> Iterator[Running]:
        if self._rules.within_tenant == "never":
            return
        places = places_of(self._draft, self._tenant)
        for _, running in self._evictable.in_order(self._tenant):
            if running.job.priority < self._priority or (
                running.job.priority == self._priority and self._goes_before(running.job, places.get(running.job.id))
            ):
                yield running

    def _goes_before(self, job: Job, place: Place | None) -> bool:
        """May it have the place of a job of its own tenant and priority?"""
        if self._rules.within_tenant == "lower_or_newer_equal" and job.submitted_at > self._bid.submitted_at:
            return True
        return place is not None and place.yields_to(self._bid)

    @cached_property
    def _borrowers(self) -> dict[str, tuple[int, int]]:
        """The tenants with jobs that borrow what this one asks for, each with where their sides part."""
        found: dict[str, tuple[int, int]] = {}
        if not self._limited or self._rules.reclaim == "never":
            return found
        for mine in self._forest.way_up(self._tenant)[:-1]:
            for theirs in self._forest.children[self._forest.parent[mine]]:
                if theirs != mine and self._borrows(theirs):
                    found |= {t: (mine, theirs) for t in self._forest.subtree[theirs] if self._world.of_tenant.get(t)}
        return found

    def _others(self, tenants: Iterable[str], most: int | None = None) -> dict[str, list[tuple[Order, Running]]]:
        """Their jobs that may be evicted, of a priority of at most `most`, in the order of victims."""
        if self._rules.reclaim == "lower_priority":
            most = self._priority - 1 if most is None else min(most, self._priority - 1)
        out = {}
        for tenant in tenants:
            jobs = self._evictable.in_order(tenant)
            out[tenant] = jobs if most is None else [(order, r) for order, r in jobs if r.job.priority <= most]
        return out

    def _borrows(self, i: int) -> bool:
        return any(self._use.excess(i, resource) > 0 for resource, _ in self._limited)

    @property
    def _use(self) -> QuotaUse:
        return self._trial.book.use

    def _piece(self, running: Running, reason: str) -> Piece:
        taken = [p.load for p in self._trial.taken if p.running is running]
        load = running.load.without(taken) if taken else running.load
        return Piece(running, load, reason, self._world.expected_end(running.job))

    def _still_borrows(self, running: Running) -> bool:
        return self._borrows(self._borrowers[running.job.tenant][1])

    # ------------------------------------------------------------------ nominal

    def _sides(self) -> Iterator[set[int]]:
        """The sides that may take something back: all of them, then without the inner ones, because what is within a
        pool may be more than the tenant's own."""
        found = {mine for mine, _ in self._borrowers.values()}
        below = [i for i in self._forest.way_up(self._tenant) if i in found and self._is_below(i)]
        for inner in range(max(1, len(below))):
            yield set(below[inner:])

    def _by_nominal(self, sides: Set[int]) -> Iterator[Piece]:
        borrowers = self._borrowers
        for running in self._ordered(self._others(t for t, (mine, _) in borrowers.items() if mine in sides)):
            if self._still_borrows(running):
                yield self._piece(running, RECLAIM)
        for running in self._own():
            yield self._piece(running, WITHIN)

    def _is_below(self, i: int) -> bool:
        """Did the subtree leave some of its own unused, of all that is asked for, before anybody was evicted?"""
        return all(self._before[i, r] < 0 for r, _ in self._limited)

    def _me_with_pools(self) -> int:
        """The highest ancestor whose quota is the tenant's own and its pools', and not all of the tree's."""
        way = self._forest.way_up(self._tenant)
        return way[-2] if len(way) > 1 else way[0]

    def _within_nominal(self) -> bool:
        """Does it end within what belongs to its side, seen from each victim; and with its own victims alone, within
        its nominal quota and pools, or borrowing no more than before?"""
        borrowers = self._borrowers
        if sides := {borrowers[p.running.job.tenant][0] for p in self._trial.taken if p.reason == RECLAIM}:
            return all(self._after(i, r, n) <= 0 for i in sides for r, n in self._limited)
        if not any(piece.reason for piece in self._trial.taken) or not self._use.borrows(
            self._tenant, self._trial.demand
        ):
            return True
        return all(self._after(self._me, r, n) <= self._before[self._me, r] for r, n in self._limited)

    def _after(self, i: int, resource: str, amount: int) -> int:
        """The excess of one of its ancestors with the job started."""
        demand = ((resource, amount),)
        self._use.charge(self._tenant, demand)
        excess = self._use.excess(i, resource)
        self._use.charge(self._tenant, demand, -1)
        return excess

    # ------------------------------------------------------------------ fair share

    def _by_fair_share(self) -> Iterator[Piece]:
        refused: dict[str, list[tuple[Order, Running]]] = {}
        for running in self._by_share(self._others(self._borrowers)):
            if not self._still_borrows(running):
                continue
            mine, _, after = self._shares(running)
            if mine <= after:
                yield self._piece(running, FAIR)
            else:
                refused.setdefault(running.job.tenant, []).append((self._evictable.order(running), running))
        for running in self._by_share(refused):
            mine, before, _ = self._shares(running)
            if mine < before and self._still_borrows(running):
                yield self._piece(running, FAIR)

    def _shares(self, running: Running) -> tuple[float, float, float]:
        """(this side's share with the job started, the victim's side's before and after its eviction)."""
        parting, use = self._borrowers[running.job.tenant], self._use
        before = use.share(parting[1])
        use.charge(running.job.tenant, running.load.demand, -1)
        after = use.share(parting[1])
        use.charge(running.job.tenant, running.load.demand)
        use.charge(self._tenant, self._trial.demand)
        mine = use.share(parting[0])
        use.charge(self._tenant, self._trial.demand, -1)
        return mine, before, after

    def _ordered(self, candidates: dict[str, list[tuple[Order, Running]]]) -> Iterator[Running]:
        if self._world.policy.fair_sharing:
            return self._by_share(candidates)
        return (running for _, running in heapq.merge(*candidates.values()))

    def _by_share(self, candidates: dict[str, list[tuple[Order, Running]]]) -> Iterator[Running]:
        """Each time the first candidate of the tenant whose side has the largest share, seen from the root down."""
        at = {tenant: 0 for tenant, jobs in candidates.items() if jobs}
        while at:
            tenant = min(at, key=lambda name: (self._path(name), candidates[name][at[name]][0]))
            running = candidates[tenant][at[tenant]][1]
            at[tenant] += 1
            if at[tenant] == len(candidates[tenant]):
                del at[tenant]
            yield running

    def _path(self, tenant: str) -> tuple[float, ...]:
        return tuple(-self._use.share(i) for i in reversed(self._forest.way_up(tenant)[:-1]))

    # ------------------------------------------------------------------ borrowing

    def _by_borrowing(self) -> Iterator[Piece]:
        assert self._rules.borrow is not None
        most = min(self._rules.borrow.max_priority, self._priority - 1)
        others = self._others(self._borrowers, most) if self._is_below(self._me_with_pools()) else {}
        for running in self._ordered(others):
            if self._still_borrows(running):
                yield self._piece(running, BORROWING)
        for running in self._own():
            if running.job.priority <= self._rules.borrow.max_priority:
                yield self._piece(running, WITHIN)

    def _whatever(self) -> bool:
        return True
