"""Owns the decision about one job whose turn it is: the place where it starts, or the reason why it does not.

Refuses to know whose turn comes next. What did not fit on the nodes once is not tried again in the same pass, whichever
tenant or priority asks for it, because what is free only shrinks.
"""

from collections.abc import Sequence

from phalanx_server.domain.reason import Explanation, TopologyUnsupported
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.explain import explain_nodes, explain_quota, possible_types, weakest
from phalanx_server.scheduling.gates import closed_gate
from phalanx_server.scheduling.order import Ask, ClassKey
from phalanx_server.scheduling.place import Spot


class Desk:
    """Decides against a draft, and remembers refusals."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._refused: dict[tuple[Ask, str | None, str | None], Explanation] = {}
        self._possible: dict[tuple[str, Ask], Sequence[str | None]] = {}

    def decide(self, key: ClassKey) -> Spot | Explanation:
        """For the first GPU type, best first, that the quotas and the nodes allow: the place. Else why none does."""
        closed = closed_gate(key.gates, self._draft.world.now, self._draft.array_jobs)  # its array may be full by now
        if closed is not None:
            return closed
        refusals: list[Explanation] = []
        for gpu_type in self._types(key):
            answer = self._decide_on(key, gpu_type)
            if isinstance(answer, Spot):
                return answer
            refusals.append(answer)
        return weakest(refusals)

    def borrows(self, key: ClassKey) -> bool:
        """Would it use others' nominal quota, on every GPU type of which the quotas leave enough?"""
        in_quota = [t for t in self._types(key) if self._is_in_quota(key, t)]
        return bool(in_quota) and all(self._borrows_on(key, t) for t in in_quota)

    def _decide_on(self, key: ClassKey, gpu_type: str | None) -> Spot | Explanation:
        if not self._is_in_quota(key, gpu_type):
            return explain_quota(self._draft, key.tenant, key.ask.shape.demand(gpu_type, key.ask.replicas))
        question = (key.ask, gpu_type, self._draft.account(key))
        if question in self._refused:
            return self._refused[question]
        spot = self._draft.spot(key, gpu_type, self._draft.both)
        if spot is not None and (key.ask.bound_to is None or len(spot.columns) == 1):
            return spot
        if spot is not None and key.ask.bound_to is not None:
            self._refused[question] = TopologyUnsupported(key.ask.bound_to)
        else:
            self._refused[question] = explain_nodes(self._draft, key, gpu_type)
        return self._refused[question]

    def _is_in_quota(self, key: ClassKey, gpu_type: str | None) -> bool:
        return self._draft.is_in_quota(key.tenant, key.ask.shape.demand(gpu_type, key.ask.replicas), self._draft.both)

    def _types(self, key: ClassKey) -> Sequence[str | None]:
        """The possible GPU types, best first; where none is named, those first of which it borrows nothing."""
        question = (key.tenant, key.ask)
        if question not in self._possible:
            self._possible[question] = possible_types(self._draft.world, *question)
        types = self._possible[question]
        if key.ask.gpu_types or len(types) < 2:
            return types
        return sorted(types, key=lambda t: (self._borrows_on(key, t), t or ""))

    def _borrows_on(self, key: ClassKey, gpu_type: str | None) -> bool:
        return self._draft.now.use.borrows(key.tenant, key.ask.shape.demand(gpu_type, key.ask.replicas))
