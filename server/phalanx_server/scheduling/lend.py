"""Owns what idle nominal quota is not lent: what its owner waits for, and could not take back.

Refuses to keep anything from whom the owner may evict, or from whom has left again before the owner is expected to
start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.order import Bid, ClassKey
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.turns import Turn


@dataclass(frozen=True, slots=True)
class Wanted:
    """An owner's idle nominal for which a job of its own waits. `starts_at`: when that is expected to start."""

    tenant: str
    priority: int
    reclaim: str
    job: str
    amounts: Demand
    starts_at: float | None


class Lending:
    """Who waits for nominal quota of its own, in one pass."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._wanted: list[Wanted] = []
        self._seen: set[str] = set()
        self._has_strict = False

    def want(self, turn: Turn, options: Sequence[Option], starts_at: float | None) -> None:
        """A job waits. Does its tenant's nominal quota hold it?"""
        for option in options if turn.key.tenant not in self._seen else ():
            self._want(turn.member.id, turn.key, option, starts_at)

    def _want(self, job: str, key: ClassKey, option: Option, starts_at: float | None) -> None:
        forest, use = self._draft.world.forest, self._draft.soon.use
        i = forest.number[key.tenant]
        idle = {}
        for resource, amount in option.demand:
            limits = forest.limits.get(resource)
            if limits is None or not limits.limited[i]:
                continue
            if amount > limits.nominal[i]:
                return
            idle[resource] = max(0, min(amount, -use.excess(i, resource)))
        if key.tenant not in self._seen and any(idle.values()):
            self._seen.add(key.tenant)
            reclaim = forest.tenants[i].preemption.reclaim
            self._has_strict |= reclaim != "any"
            self._wanted.append(Wanted(key.tenant, key.priority, reclaim, job, tuple(idle.items()), starts_at))

    def refuses(self, bid: Bid, option: Option) -> Sequence[Wanted]:
        """For what a borrower has to wait; () = it may borrow."""
        key = bid.key
        if key.preemptible and not self._has_strict:
            return ()
        ends_at = self._draft.ends_at(bid)
        against = [w for w in self._wanted if self._is_kept(w, key, ends_at)]
        if not against:
            return ()
        use = self._draft.soon.use.copy()
        for wanted in against:
            use.charge(wanted.tenant, wanted.amounts)
        return against if use.shortage(key.tenant, option.demand) is not None else ()

    def _is_kept(self, wanted: Wanted, key: ClassKey, ends_at: float) -> bool:
        if wanted.tenant == key.tenant or (wanted.starts_at is not None and ends_at <= wanted.starts_at):
            return False
        could_reclaim = wanted.reclaim == "any" or (
            wanted.reclaim == "lower_priority" and key.priority < wanted.priority
        )
        return not (could_reclaim and key.preemptible)
