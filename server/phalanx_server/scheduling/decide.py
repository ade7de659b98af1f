"""Owns the decision about one job whose turn it is: the place where it starts, or the reason why it does not.

Refuses to know whose turn comes next. What did not fit on the nodes once is not tried again in the same pass, whichever
tenant or priority asks for it, because what is free only shrinks.
"""

from collections.abc import Sequence

from phalanx_server.domain.reason import Explanation, TopologyUnsupported
from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.explain import explain_nodes, explain_quota, weakest
from phalanx_server.scheduling.fit import holds_gang
from phalanx_server.scheduling.gates import closed_gate
from phalanx_server.scheduling.order import NO_GATES, Ask, ClassKey, JobClass
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.possible import Option, explain_impossible, options_of


class Desk:
    """Decides against a draft, and remembers refusals."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._refused: dict[tuple[Ask, str | None, str | None], Explanation | None] = {}
        self._over_quota: dict[tuple[str, Demand], Explanation] = {}

    def refuse(self, group: JobClass) -> Explanation | None:
        """Why no job of the class can start any more, as far as is known without a search; None = it may be tried."""
        key = group.key
        options = options_of(self._draft.world, group)
        if not options:
            return explain_impossible(self._draft.world, key)
        return self._closed_gate(key) or self._refusal(key, options)

    def decide(self, group: JobClass) -> Spot | Explanation:
        """For the first option, best first, that the quotas and the nodes allow: the place. Else why none does. To be
        asked about a class that is not refused."""
        refusals: list[Explanation] = []
        for option in self._options(group):
            answer = self._decide_on(group.key, option)
            if isinstance(answer, Spot):
                return answer
            refusals.append(answer)
        return weakest(refusals)

    def borrows(self, group: JobClass) -> bool:
        """Would a job of the class use others' nominal quota, whatever option is taken?"""
        return all(self._borrows_by(group.key, option) for option in options_of(self._draft.world, group))

    def _closed_gate(self, key: ClassKey) -> Explanation | None:
        if key.gates is NO_GATES:
            return None
        return closed_gate(key.gates, self._draft.world.now, self._draft.array_jobs)

    def _refusal(self, key: ClassKey, options: Sequence[Option]) -> Explanation | None:
        refusals: list[Explanation] = []
        for option in options:
            refusal = self._quota_refusal(key, option) or self._room_refusal(key, option)
            if refusal is None:
                return None
            refusals.append(refusal)
        return weakest(refusals)

    def _decide_on(self, key: ClassKey, option: Option) -> Spot | Explanation:
        over = self._quota_refusal(key, option)
        if over is not None:
            return over
        question = (key.ask, option.gpu_type, self._draft.account(key))
        refused = self._refused.get(question)
        if refused is not None:
            return refused
        spot = self._draft.spot(key, option.gpu_type, self._draft.both)
        if spot is None:
            why: Explanation = explain_nodes(self._draft, key, option.gpu_type)
        elif key.ask.bound_to is not None and len(spot.columns) > 1:
            why = TopologyUnsupported(key.ask.bound_to)
        else:
            return spot
        self._refused[question] = why
        return why

    def _room_refusal(self, key: ClassKey, option: Option) -> Explanation | None:
        draft = self._draft
        question = (key.ask, option.gpu_type, draft.account(key))
        if question not in self._refused:
            free, allowed = draft.usable(key.ask, draft.both), draft.allowed(key, draft.both)
            fits = holds_gang(draft.table, free, key.ask, option.gpu_type, allowed)
            self._refused[question] = None if fits else explain_nodes(draft, key, option.gpu_type)
        return self._refused[question]

    def _quota_refusal(self, key: ClassKey, option: Option) -> Explanation | None:
        if self._is_in_quota(key, option):
            return None
        question = (key.tenant, option.demand)
        if question not in self._over_quota:
            self._over_quota[question] = explain_quota(self._draft, *question)
        return self._over_quota[question]

    def _is_in_quota(self, key: ClassKey, option: Option) -> bool:
        return self._draft.is_in_quota(key.tenant, option.demand, self._draft.both)

    def _options(self, group: JobClass) -> Sequence[Option]:
        """The options, best first; where the job names no GPU type, those first by which it borrows nothing."""
        options = options_of(self._draft.world, group)
        if group.key.ask.gpu_types or len(options) < 2:
            return options
        return sorted(options, key=lambda o: (self._borrows_by(group.key, o), o.gpu_type or ""))

    def _borrows_by(self, key: ClassKey, option: Option) -> bool:
        return self._draft.now.use.borrows(key.tenant, option.demand)
