"""Owns the decision about one job whose turn it is: it starts, room is made for it, or it is told why it waits.

Refuses to know whose turn comes next. What did not fit on the nodes once is not tried again in the same pass, whichever
tenant or priority asks for it, because what is free now only shrinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from operator import le

from phalanx_server.domain.reason import Explanation, Reserved, WaitsForVictims
from phalanx_server.domain.resources import Demand
from phalanx_server.scheduling.draft import Books, Draft, Room
from phalanx_server.scheduling.explain import explain_nodes, explain_quota, weakest
from phalanx_server.scheduling.gates import closed_gate
from phalanx_server.scheduling.lend import Lending, Wanted
from phalanx_server.scheduling.make_room import make_room, may_be_made
from phalanx_server.scheduling.order import NO_GATES, Ask, Bid, ClassKey, JobClass
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.plan import HoldGroup
from phalanx_server.scheduling.possible import Option, explain_impossible, options_of
from phalanx_server.scheduling.snapshot import Seat
from phalanx_server.scheduling.turns import NOBODY, Unless


@dataclass(frozen=True, slots=True)
class Waits:
    """A job waits for others to stop, and this is kept for it."""

    spot: Spot
    room: Room | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A job cannot start now, and nothing is kept for it. That goes for its class, `unless`."""

    why: Explanation
    unless: Unless = NOBODY


class Desk:
    """Decides against a draft, and remembers refusals."""

    def __init__(self, draft: Draft, lending: Lending) -> None:
        self._draft = draft
        self._lending = lending
        self._no_room: dict[tuple[Ask, str | None, str], Explanation] = {}
        self._has_room: dict[tuple[Ask, str | None, str], tuple[int, int]] = {}
        self._room_soon: dict[tuple[Ask, str | None, str], tuple[int, bool]] = {}
        self._full: dict[tuple[object, ...], tuple[int, float]] = {}
        self._over_quota: dict[tuple[str, Demand], Explanation] = {}
        self._hopeless: dict[tuple[object, ...], list[tuple[float, float, float]]] = {}

    def refuse(self, group: JobClass) -> Explanation | None:
        """Why no job of the class can start or be made room for, whatever happens in this pass; None = it may be
        tried."""
        if not options_of(self._draft.world, group):
            return explain_impossible(self._draft.world, group.key)
        gates = group.key.gates
        if gates is NO_GATES:
            return None
        return closed_gate(gates, self._draft.world.now, self._draft.array_jobs)

    def decide(self, bid: Bid, options: Sequence[Option]) -> Spot | Waits | Refusal:
        """For the first option, best first, that the quotas and the nodes allow: the place. Else the same with what
        others leave, or are made to leave. Else why there is none. To be asked about a class that is not refused."""
        refusals: list[Refusal] = []
        for option in options:
            answer = self._start(bid, option)
            if isinstance(answer, Spot):
                return answer
            refusals.append(answer)
        if self._draft.leaving and (waits := self._with_what_leaves(bid, options, refusals)) is not None:
            return waits
        ends_by = max(r.unless.ends_by for r in refusals)
        if may_be_made(self._draft, bid, options):
            if (waits := self._with_room_made(bid, options)) is not None:
                return waits
            ends_by = max(ends_by, self._last_book(bid), *(_starts_by(self._kept_from(bid, o)) for o in options))
        unless = self._unless(bid, ends_by)
        return Refusal(weakest([r.why for r in refusals]) if len(refusals) > 1 else refusals[0].why, unless)

    def _unless(self, bid: Bid, ends_by: float) -> Unless:
        world = self._draft.world
        rule = world.forest.tenants[world.forest.number[bid.key.tenant]].preemption.within_tenant
        behind_s = bid.behind_s if world.policy.preempt_longer else -inf
        before = bid.submitted_at if rule == "lower_or_newer_equal" else -inf
        return NOBODY if ends_by == behind_s == before == -inf else Unless(ends_by, behind_s, before)

    def demand(self, group: JobClass) -> Demand:
        """What a job of the class takes, by its first option."""
        first = options_of(self._draft.world, group)[0]
        return group.key.ask.shape.demand(first.gpu_type, group.key.ask.replicas)

    def borrows(self, group: JobClass) -> bool:
        """Would a job of the class use others' nominal quota, whatever option is taken?"""
        for option in options_of(self._draft.world, group):  # noqa: SIM110  (one of the hot places of a pass)
            if not self._borrows_by(group.key, option):
                return False
        return True

    def options(self, group: JobClass) -> Sequence[Option]:
        """How a job of the class may run, best first; where it names no GPU type, those first by which it borrows
        nothing."""
        options = options_of(self._draft.world, group)
        if group.key.ask.gpu_types or len(options) < 2:
            return options
        return sorted(options, key=lambda o: (self._borrows_by(group.key, o), o.gpu_type or ""))

    # ------------------------------------------------------------------ starting

    def _start(self, bid: Bid, option: Option) -> Spot | Refusal:
        key = bid.key
        refusal = self._quota_refusal(key.tenant, option.least_demand) or self._room_refusal(key, option)
        if refusal is not None:
            return Refusal(refusal)
        if kept := self._kept_from(bid, option):
            return Refusal(Reserved(tuple(wanted.job for wanted in kept)), Unless(_starts_by(kept)))
        spot = self._largest(bid, option)
        if spot is not None:
            return spot
        return Refusal(Reserved(tuple(self._draft.ahead)), Unless(self._last_book(bid)))

    def _last_book(self, bid: Bid) -> float:
        """The moment of the last book that it has to be in order in: who ends by then has fewer of them."""
        books = self._draft.soon_until(self._draft.ends_at(bid))
        return books[-1].at if len(books) > 1 else -inf

    def _largest(self, bid: Bid, option: Option) -> Spot | None:
        """The place for as many replicas as are asked for; or, of an elastic job, for as many as there is room."""
        ask = bid.key.ask
        spot, step = self._spot(bid, option, ask.replicas), ask.step
        low, high = ask.least_replicas // step, (ask.replicas - 1) // step
        if spot is not None:
            return spot
        while low <= high:
            middle = (low + high + 1) // 2
            found = self._spot(bid, option, middle * step)
            if found is not None:
                spot, low = found, middle + 1
            else:
                high = middle - 1
        return spot

    def _spot(self, bid: Bid, option: Option, replicas: int) -> Spot | None:
        return self._place(bid.key, option, self._draft.until(self._draft.ends_at(bid)), replicas)

    def _place(self, key: ClassKey, option: Option, books: Books, replicas: int) -> Spot | None:
        """Where the books have room, quotas included."""
        draft = self._draft
        question = (key.ask, option.gpu_type, draft.account(key), replicas, books[0] is draft.now)
        if self._is_full(question, books):
            return None
        if not draft.is_in_quota(key.tenant, key.ask.shape.demand(option.gpu_type, replicas), books):
            return None
        spot = draft.spot(key, option.gpu_type, books, replicas=replicas)
        if spot is None:
            self._full[question] = len(draft.relieved), books[-1].at
        return spot

    def _is_full(self, question: tuple[object, ...], books: Books) -> bool:
        """Where there was no room there is none for whoever needs it as long, until somebody is made to stop."""
        tried_at, until = self._full.get(question, (-1, inf))
        return tried_at == len(self._draft.relieved) and books[-1].at >= until

    def _room_refusal(self, key: ClassKey, option: Option) -> Explanation | None:
        """Why the nodes have no room now or soon, reservations apart."""
        draft = self._draft
        question = (key.ask, option.gpu_type, draft.account(key))
        if question in self._no_room:
            return self._no_room[question]
        version = (draft.now.changes, draft.soon.changes)
        if self._has_room.get(question) != version:
            if not draft.may_hold(key, option.gpu_type):
                why = self._no_room[question] = explain_nodes(draft, key, option.gpu_type)
                return why
            self._has_room[question] = version
        return None

    def _quota_refusal(self, tenant: str, demand: Demand) -> Explanation | None:
        if self._draft.is_in_quota(tenant, demand, self._draft.now_and_soon):
            return None
        question = (tenant, demand)
        if question not in self._over_quota:
            self._over_quota[question] = explain_quota(self._draft, *question)
        return self._over_quota[question]

    # ------------------------------------------------------------------ waiting for others to stop

    def _with_what_leaves(self, bid: Bid, options: Sequence[Option], refusals: list[Refusal]) -> Waits | None:
        draft, key = self._draft, bid.key
        books = draft.soon_until(draft.ends_at(bid))
        for option in options:
            if not draft.is_in_quota(key.tenant, option.least_demand, books[:1]) or self._kept_from(bid, option):
                continue
            spot = self._place(key, option, books, key.ask.least_replicas)
            if spot is not None:
                return Waits(spot, None)
            if len(books) > 1 and self._will_be_room(key, option):  # only what is reserved is in the way
                refusals.append(Refusal(refusals[0].why, Unless(books[-1].at)))
        return None

    def _will_be_room(self, key: ClassKey, option: Option) -> bool:
        """Do the nodes have room soon, reservations apart?"""
        draft, question = self._draft, (key.ask, option.gpu_type, self._draft.account(key))
        known = self._room_soon.get(question)
        if known is None or known[0] != draft.soon.changes:
            spot = draft.spot(key, option.gpu_type, (draft.soon,), replicas=key.ask.least_replicas)
            known = self._room_soon[question] = draft.soon.changes, spot is not None
        return known[1]

    def _with_room_made(self, bid: Bid, options: Sequence[Option]) -> Waits | None:
        key = bid.key
        question = (key.tenant, key.priority, key.ask, key.preemptible, self._draft.version)
        mine = (self._last_book(bid), bid.behind_s, bid.submitted_at)
        if any(all(map(le, known, mine)) for known in self._hopeless.get(question, ())):
            return None  # in vain for one that has as little in its way and as many to yield to it
        room = make_room(self._draft, bid, [o for o in options if not self._kept_from(bid, o)])
        if room is None:
            self._hopeless.setdefault(question, []).append(mine)
            return None
        return Waits(room.spot, room)

    def _kept_from(self, bid: Bid, option: Option) -> Sequence[Wanted]:
        """What owners wait for that it would borrow; () = it borrows nothing, or may."""
        return self._lending.refuses(bid, option) if self._borrows_by(bid.key, option) else ()

    def _borrows_by(self, key: ClassKey, option: Option) -> bool:
        return self._draft.now.use.borrows(key.tenant, option.demand)


def _starts_by(kept: Sequence[Wanted]) -> float:
    """Who ends by then may borrow what is kept; -inf if nobody may, or nothing is kept."""
    return max((wanted.starts_at for wanted in kept if wanted.starts_at is not None), default=-inf)


def hold_for(draft: Draft, job: str, spot: Spot) -> HoldGroup:
    """The hold of a job for which this place is kept until others have left it."""
    seat = Seat(gpu_type=spot.gpu_type, placement=spot.placement(draft.table))
    starts_at = draft.world.now + draft.world.policy.restart_s
    return HoldGroup((job,), WaitsForVictims(_victims(draft, job, seat), starts_at), seat)


def _victims(draft: Draft, job: str, seat: Seat) -> tuple[str, ...]:
    """Who stops for it; if nobody does, who leaves the nodes that are kept for it."""
    if mine := draft.stops_for.get(job):
        return tuple(sorted(mine))
    nodes = {item.node for item in seat.placement}
    leaving = draft.leaving.values()
    return tuple(sorted(j.id for j in leaving if not nodes.isdisjoint(item.node for item in j.placement)))
