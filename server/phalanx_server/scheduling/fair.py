"""Owns whose turn it is under fair sharing: a tournament over the tenant tree.

Refuses to know what is free. Two tenants are compared at their ancestors just below the lowest that they share: by the
dominant share that each would have with its next job started, then by decayed past use, then by the jobs' own places in
the queue. A job that starts counts at once, and as past use of `ENTRY_PENALTY_S`, so that a burst does not get ahead of
the accounts. (Dominant Resource Fairness, NSDI'11; the tournament and the entry penalty are Kueue's.)
"""

import heapq
from collections.abc import Callable, Iterable, Iterator

from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.order import JobClass, Rank
from phalanx_server.scheduling.quota import LEAST_WEIGHT
from phalanx_server.scheduling.turns import Turn

ENTRY_PENALTY_S = 600.0

_Key = tuple[float, float, Rank]


class FairTurns:
    """As `turns.Turns`. `demand_of`: what a job of a class takes of the quotas."""

    def __init__(self, turns: Iterable[Turn], draft: Draft, demand_of: Callable[[JobClass], Demand]) -> None:
        self._draft, self._demand_of = draft, demand_of
        self._forest = draft.world.forest
        count = len(self._forest.tenants)
        self._past = self._past_use()
        self._turns: list[Turn] = []
        self._waiting: tuple[list[list[tuple[Rank, int]]], ...] = (
            [[] for _ in range(count)],
            [[] for _ in range(count)],
        )
        self._roots = [i for i, above in enumerate(self._forest.parent) if above < 0]
        self._best: tuple[dict[int, int | None], ...] = ({}, {})
        self._keys: tuple[dict[int, _Key], ...] = ({}, {})
        self._seen = 0
        for turn in turns:
            turn.number = len(self._turns)
            self._turns.append(turn)
            self.return_to(turn)

    def __iter__(self) -> Iterator[Turn]:
        """Each next turn, for as long as there are any: first of those that stay within nominal."""
        while (turn := self._next(deferred=False) or self._next(deferred=True)) is not None:
            yield turn

    def again(self, turn: Turn) -> None:
        """Its member is done with: the class comes again with the next one, if there is one."""
        if turn.is_settled:
            self._enter(turn)
        turn.at += 1
        if turn.at < len(turn.members):
            self.return_to(turn)

    def defer(self, turn: Turn) -> None:
        """It borrows: the class comes again after all that stay within nominal."""
        turn.is_deferred = True
        self.return_to(turn)

    def _enter(self, turn: Turn) -> None:
        way = self._forest.way_up(turn.key.tenant)
        for resource, amount in self._demand_of(turn.group):
            for i in way:
                past = self._past[i]
                past[resource] = past.get(resource, 0.0) + amount * ENTRY_PENALTY_S
        self._forget(way)

    def _forget(self, way: Iterable[int]) -> None:
        for known in (*self._best, *self._keys):
            for i in way:
                known.pop(i, None)

    def return_to(self, turn: Turn) -> None:
        """The class comes again with the member at which it stands."""
        i = self._forest.number[turn.key.tenant]
        heapq.heappush(self._waiting[turn.is_deferred][i], (turn.rank, turn.number))
        self._forget(self._forest.way_up(turn.key.tenant))

    def _next(self, *, deferred: bool) -> Turn | None:
        for tenant in self._draft.relieved[self._seen :]:
            self._forget(self._forest.way_up(tenant))
        self._seen = len(self._draft.relieved)
        found = [w for w in (self._winner(i, deferred) for i in self._roots) if w is not None]
        if not found:
            return None
        turn = min((self._turns[number] for number in found), key=lambda t: t.rank)
        heapq.heappop(self._waiting[deferred][self._forest.number[turn.key.tenant]])
        self._forget(self._forest.way_up(turn.key.tenant))
        return turn

    def _winner(self, i: int, deferred: bool) -> int | None:
        """The number of the turn that wins in the subtree."""
        best = self._best[deferred]
        if i not in best:
            waiting = self._waiting[deferred][i]
            own = [waiting[0][1]] if waiting else []
            below = [(c, w) for c in self._forest.children[i] if (w := self._winner(c, deferred)) is not None]
            if own or not below:
                best[i] = own[0] if own else None
            else:
                best[i] = min(below, key=lambda entry: self._key(*entry, deferred))[1]
        return best[i]

    def _key(self, i: int, number: int, deferred: bool) -> _Key:
        keys = self._keys[deferred]
        if i not in keys:
            turn = self._turns[number]
            share = self._draft.soon.use.share_with(i, turn.key.tenant, self._demand_of(turn.group))
            keys[i] = share, self._past_share(i), turn.rank
        return keys[i]

    # ------------------------------------------------------------------ past use

    def _past_use(self) -> list[dict[str, float]]:
        past = [dict(t.usage) for t in self._forest.tenants]
        for i in self._forest.upward:
            if (above := self._forest.parent[i]) >= 0:
                for resource, used in past[i].items():
                    past[above][resource] = past[above].get(resource, 0.0) + used
        return past

    def _past_share(self, i: int) -> float:
        """Decayed past use of the subtree by what the tree could have lent it in a half-life, over its weight."""
        above, half_life_s = self._forest.parent[i], max(1.0, self._draft.world.policy.usage_half_life_s)
        largest = 0.0
        for resource, used in self._past[i].items():
            lendable = self._forest.most(self._forest.tenants[above if above >= 0 else i].name, resource)
            largest = max(largest, used / (max(1, lendable or 1) * half_life_s))
        return largest / max(self._forest.tenants[i].weight, LEAST_WEIGHT)
