"""Owns quota arithmetic over the tenant tree: what a tenant may still use, what it borrows, what it could use at most.

Refuses to know jobs and nodes. A resource is a GPU type, `cpu` or `memory_gib`; a tree in which nobody has a quota for
a resource has no limit on it. Within a tree, what a subtree does not lend (above `lending_limit`) stays inside it;
roots do not lend to each other. The sums are those of Kueue's hierarchical cohorts
(pkg/cache/scheduler/resource_node.go).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.snapshot import Quota, Tenant

_NOTHING = Quota(nominal=0)

LEAST_WEIGHT = 1e-12
"""What weight 0 counts as: it loses to every other, and two of weight 0 share as two of equal weight, or they would
take the same GPUs from each other for ever."""


@dataclass(frozen=True, slots=True)
class Limits:
    """One resource, by tenant number. `own` is what the subtree never lends, and `have` all that belongs to it; `keeps`
    says whether anybody in it has something of the former."""

    nominal: list[int]
    own: list[int]
    keeps: list[bool]
    have: list[int]
    borrowing: list[int | None]
    limited: list[bool]


@dataclass(frozen=True, slots=True)
class Shortage:
    """A tenant asks for more of a resource than is left to it; `limiter` is the tenant whose limit is the tightest."""

    resource: str
    asks: int
    leaves: int
    limiter: str


class QuotaForest:
    """The tenants and their limits; fixed until quotas change."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self.tenants = sorted(tenants, key=lambda t: t.name)
        self.number = {t.name: i for i, t in enumerate(self.tenants)}
        self.parent = [-1 if t.parent is None else self.number[t.parent] for t in self.tenants]
        self.upward = self._children_first()
        self.children: list[list[int]] = [[] for _ in self.tenants]
        for i, above in enumerate(self.parent):
            if above >= 0:
                self.children[above].append(i)
        self.subtree: list[list[str]] = [[t.name] for t in self.tenants]
        """By number, the names of a tenant and all below it."""
        for i in self.upward:
            if (above := self.parent[i]) >= 0:
                self.subtree[above] += self.subtree[i]
        self._ways = [self._way(i) for i in range(len(self.tenants))]
        resources = sorted({name for t in self.tenants for name in t.quotas})
        self.limits = {name: self._limits(name) for name in resources}
        idle = QuotaUse(self)
        self._own_and_pools = {
            r: [sum(limits.nominal[j] for j in self.way_up(t.name)) for t in self.tenants]
            for r, limits in self.limits.items()
        }
        self._most = {r: [idle.left(i, r) for i in range(len(self.tenants))] for r in resources}

    def limited(self, tenant: str, demand: Demand) -> Demand:
        """What of a demand is limited for the tenant."""
        i = self.number[tenant]
        return tuple((r, n) for r, n in demand if r in self.limits and self.limits[r].limited[i])

    def most(self, tenant: str, resource: str) -> int | None:
        """What the tenant could use if all others, and its own jobs, were idle; None = no limit."""
        by_tenant = self._most.get(resource)
        return None if by_tenant is None else by_tenant[self.number[tenant]]

    def most_of(self, i: int, resource: str) -> int:
        """The same by the tenant's number; 0 where there is no limit."""
        return self._most[resource][i] or 0

    def may_borrow(self, i: int, resource: str) -> bool:
        """Could tenant number `i` ever use more than its nominal quota and the pools above it?"""
        return self.most_of(i, resource) > self._own_and_pools[resource][i]

    def branch(self, tenant: str) -> str:
        """The root's child above a tenant, or the root itself."""
        i = self.number[tenant]
        while self.parent[i] >= 0 and self.parent[self.parent[i]] >= 0:
            i = self.parent[i]
        return self.tenants[i].name

    def way_up(self, tenant: str) -> list[int]:
        """The numbers of a tenant and all above it, root last. Not to be changed."""
        return self._ways[self.number[tenant]]

    def _way(self, i: int) -> list[int]:
        way = [i]
        while (above := self.parent[way[-1]]) >= 0:
            way.append(above)
        return way

    def _children_first(self) -> list[int]:
        depth = [0] * len(self.tenants)
        for i in range(len(self.tenants)):
            above = self.parent[i]
            while above >= 0:
                depth[i] += 1
                above = self.parent[above]
        return sorted(range(len(self.tenants)), key=lambda i: -depth[i])

    def _limits(self, resource: str) -> Limits:
        quotas = [t.quotas.get(resource, _NOTHING) for t in self.tenants]
        named = [resource in t.quotas for t in self.tenants]
        have, own, keeps = [q.nominal for q in quotas], [0] * len(quotas), [False] * len(quotas)
        for i in self.upward:
            lending = quotas[i].lending_limit
            own[i] = 0 if lending is None else max(0, have[i] - lending)
            keeps[i] |= own[i] > 0
            if (above := self.parent[i]) >= 0:
                have[above] += have[i] - own[i]
                named[above] |= named[i]
                keeps[above] |= keeps[i]
        for i in reversed(self.upward):  # the whole tree is limited where anybody in it is
            if (above := self.parent[i]) >= 0:
                named[i] = named[above]
        return Limits([q.nominal for q in quotas], own, keeps, have, [q.borrowing_limit for q in quotas], named)


class QuotaUse:
    """What is in use, by resource and tenant.

    `_used` counts what reaches a tenant from below after each subtree has used what it never lends; `_over` what
    reaches it after each subtree has used its nominal. Both only change along the way from a tenant to its root.
    """

    def __init__(self, forest: QuotaForest) -> None:
        self.forest = forest
        self._used = {r: [0] * len(forest.tenants) for r in forest.limits}
        self._over = {r: [0] * len(forest.tenants) for r in forest.limits}
        self._known: dict[tuple[int, str], tuple[int | None, int]] = {}
        self.changes = [0] * len(forest.tenants)
        """How often something was charged in the subtree of each tenant: what was worked out in between still holds."""

    def copy(self) -> "QuotaUse":
        """The same use, to be changed apart from this one."""
        twin = QuotaUse.__new__(QuotaUse)
        twin.forest = self.forest
        twin._used = {r: list(v) for r, v in self._used.items()}
        twin._over = {r: list(v) for r, v in self._over.items()}
        twin._known = dict(self._known)
        twin.changes = list(self.changes)
        return twin

    def after(self, charges: Iterable[tuple[str, Demand, int]]) -> "QuotaUse":
        """The use once all of these (tenant, demand, times) are charged, whatever their order. In one sweep up the
        tree: quicker than `charge` for more than a few."""
        forest, amounts = self.forest, {r: [0] * len(self.forest.tenants) for r in self.forest.limits}
        for tenant, demand, times in charges:
            i = forest.number[tenant]
            for resource, amount in demand:
                if resource in amounts and forest.limits[resource].limited[i]:
                    amounts[resource][i] += amount * times
        twin = self.copy()
        for resource, added in amounts.items():
            limits = forest.limits[resource]
            for load, absorbed in ((twin._used[resource], limits.own), (twin._over[resource], limits.nominal)):
                more = list(added)
                for i in forest.upward:
                    if more[i]:
                        before = max(0, load[i] - absorbed[i])
                        load[i] += more[i]
                        if (above := forest.parent[i]) >= 0:
                            more[above] += max(0, load[i] - absorbed[i]) - before
        twin._known.clear()
        twin.changes = [count + 1 for count in twin.changes]
        return twin

    def charge(self, tenant: str, demand: Demand, times: int = 1) -> None:
        """Count a demand as used; `times` -1 gives it back."""
        self._known.clear()
        for i in self.forest.way_up(tenant):
            self.changes[i] += 1
        self._add(tenant, demand, times)

    def share_with(self, i: int, tenant: str, demand: Demand) -> float:
        """The `share` of tenant number `i` if a demand of somebody in its subtree counted as well."""
        self._add(tenant, demand, 1)
        share = self.share(i)
        self._add(tenant, demand, -1)
        return share

    def _add(self, tenant: str, demand: Demand, times: int) -> None:
        i = self.forest.number[tenant]
        for resource, amount in demand:
            limits = self.forest.limits.get(resource)
            if limits is not None and limits.limited[i]:
                self._flow(self._used[resource], limits.own, i, amount * times)
                self._flow(self._over[resource], limits.nominal, i, amount * times)

    def _flow(self, load: list[int], absorbed: Sequence[int], i: int, amount: int) -> None:
        while i >= 0 and amount:
            before = max(0, load[i] - absorbed[i])
            load[i] += amount
            amount = max(0, load[i] - absorbed[i]) - before
            i = self.forest.parent[i]

    def left(self, i: int, resource: str) -> int | None:
        """What tenant number `i` may still use; None = no limit."""
        return self._tightest(i, resource)[0]

    def _tightest(self, i: int, resource: str) -> tuple[int | None, int]:
        """(what is left, the number of the tenant that limits it), remembered until the next charge."""
        known = self._known.get((i, resource))
        if known is None:
            known = self._known[i, resource] = self._find_tightest(i, resource)
        return known

    def _find_tightest(self, i: int, resource: str) -> tuple[int | None, int]:
        limits = self.forest.limits.get(resource)
        if limits is None or not limits.limited[i]:
            return None, i
        used = self._used[resource]
        *way, root = self.forest.way_up(self.forest.tenants[i].name)
        left, limiter = max(0, limits.have[root] - used[root]), root
        for j in reversed(way):
            borrowing, borrowed = limits.borrowing[j], max(0, used[j] - limits.own[j])
            if borrowing is not None and (most := limits.have[j] - limits.own[j] + borrowing - borrowed) < left:
                left, limiter = max(0, most), j
            left += max(0, limits.own[j] - used[j])
        return left, limiter

    def shortage(self, tenant: str, demand: Demand) -> Shortage | None:
        """The first resource of which the demand is more than is left, or None: it is within quota."""
        i, known = self.forest.number[tenant], self._known
        for resource, amount in demand:
            left, limiter = known.get((i, resource)) or self._tightest(i, resource)
            if left is not None and amount > left:
                return Shortage(resource, amount, left, self.forest.tenants[limiter].name)
        return None

    def borrows(self, tenant: str, demand: Demand) -> bool:
        """Would it use more than the tenant's nominal and the pools above it, that is, somebody else's nominal?"""
        i = self.forest.number[tenant]
        for resource, amount in demand:  # noqa: SIM110  (one of the hot places of a pass)
            if self._reaches_others(i, resource, amount):
                return True
        return False

    def _reaches_others(self, i: int, resource: str, amount: int) -> bool:
        limits = self.forest.limits.get(resource)
        if limits is None or not limits.limited[i] or not self.forest.may_borrow(i, resource):
            return False
        load = self._over[resource]
        while i >= 0:
            over = load[i] - limits.nominal[i]
            if over + amount <= 0:
                return False
            amount, i = (amount if over > 0 else over + amount), self.forest.parent[i]
        return True

    def excess(self, i: int, resource: str) -> int:
        """What the subtree of tenant number `i` uses above all that belongs to it; negative: what it leaves unused."""
        limits = self.forest.limits.get(resource)
        return 0 if limits is None or not limits.limited[i] else self._used[resource][i] - limits.have[i]

    def share(self, i: int) -> float:
        """The dominant share of tenant number `i`: the largest over resources of what its subtree uses above its own
        quota, by what the tree could lend there, over its weight. The sums are those of Kueue's fair sharing
        (pkg/cache/scheduler/fair_sharing.go), which takes them from Dominant Resource Fairness (NSDI'11)."""
        largest, above = 0.0, self.forest.parent[i]
        for resource in self.forest.limits:
            borrowed = self.excess(i, resource)
            if borrowed > 0:
                lendable = self.forest.most_of(above if above >= 0 else i, resource)
                largest = max(largest, borrowed / max(1, lendable))
        return largest / max(self.forest.tenants[i].weight, LEAST_WEIGHT)
