"""Owns the pass: a snapshot in, a plan out; and the planner that the live scheduler keeps, which takes changes instead.

Refuses to know the clock, the database and what becomes of the plan. The same snapshot always gives the same plan, in
whatever order its lists are, and `Planner.apply` gives what `schedule` gives on the whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from phalanx_server.scheduling.decide import Desk, Refusal, hold_for
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.drain import empty_nodes
from phalanx_server.scheduling.fair import FairTurns
from phalanx_server.scheduling.growth import grow
from phalanx_server.scheduling.honour import honour_claims
from phalanx_server.scheduling.lend import Lending
from phalanx_server.scheduling.order import Rank
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.plan import HoldGroup, Plan
from phalanx_server.scheduling.reserve import MOST_RESERVATIONS, WAITING_HELPS, reserve
from phalanx_server.scheduling.snapshot import Changes, Job, Seat, Snapshot
from phalanx_server.scheduling.turns import Turn, Turns, turns_of
from phalanx_server.scheduling.world import World
from phalanx_server.scheduling.yielding import is_due

MOST_ROUNDS = 8
"""So often a pass looks at most whether what it stops changes anything for others."""


def schedule(snapshot: Snapshot) -> Plan:
    """The plan for a snapshot:

    1. Honour first what is kept for waiting jobs, and what others stop for.
    2. Empty the nodes that are going away: move what can go elsewhere, stop what is in a window.
    3. Let the waiting jobs take their turns, fairly between tenants, then by priority, then in the tenant's own order.
       Who fits in quota and on nodes, and delays no reservation, starts. For who does not, room is made: others are
       moved, shrunk or evicted, the least that will do. If that cannot be, it is told why and the earliest moment at
       which it could run is reserved for it.
    4. Give what is left to elastic jobs, where it buys the most progress.
    5. If anybody was stopped, do all of it again as if they were stopping already, until that adds nothing; likewise if
       GPU jobs started while CPU jobs wait for room, for they may have taken less than their share of CPUs.
    """
    return _settled(World(snapshot))


def _settled(world: World) -> Plan:
    """The plan, after which nothing is left to decide while the jobs that it stops are still stopping: where it may
    have made a difference for others, the pass is run again on a world where it is being carried out, until that adds
    nothing. The world is left as it was."""
    latest, is_loosened = _run(world)
    plan = latest
    undo: list[Changes] = []
    while (plan.stops or is_loosened) and len(undo) < MOST_ROUNDS:
        news = tuple(job for job in begun(world, latest) if job != world.jobs[job.id])
        if not news:
            break
        changes = Changes(now=world.now, jobs=news)
        undo.append(world.undo_of(changes))
        world.absorb(changes)
        latest, is_loosened = _run(world)
        plan = plan.and_then(latest)
    for changes in reversed(undo):
        world.absorb(changes)
    return plan


def begun(world: World, plan: Plan) -> Iterator[Job]:
    """The jobs that a plan touches, at the moment when it begins to be carried out."""
    for start in plan.starts:
        job = world.jobs[start.job]
        yield replace(
            job, state="running", started_at=world.now, gpu_type=start.gpu_type, placement=start.placement, kept=None
        )
    for victim in plan.preemptions:
        yield replace(world.jobs[victim.job], state="stopping", for_job=victim.for_job)
    for move in (*plan.resizes, *plan.migrations):
        goes_on = Seat(gpu_type=world.running[move.job].gpu_type, placement=move.placement)
        yield replace(world.jobs[move.job], state="stopping", for_job=move.for_job, next=goes_on)
    for group in plan.hold_groups:
        if group.kept is not None:
            for job_id in group.jobs:
                yield replace(world.jobs[job_id], kept=group.kept)


def _run(world: World) -> tuple[Plan, bool]:
    """The plan of one round, and whether it may have made room for CPU jobs that it holds."""
    draft, holds = Draft(world), _Holds()
    settled = honour_claims(draft)
    for job, hold in settled:
        if hold is not None:
            holds.add(world.queue.rank_of(job), hold)
    empty_nodes(draft)
    turns = turns_of(world.queue, [job for job, _ in settled])
    counter = _Counter(draft, holds)
    counter.serve(turns)
    counter.tell(turns)
    if world.elastic:
        grow(draft, _next_changes(draft))
    decided = draft.decided
    plan = Plan(
        starts=tuple(decided.starts),
        preemptions=tuple(decided.preemptions),
        resizes=tuple(decided.resizes),
        migrations=tuple(decided.migrations),
        hold_groups=holds.in_order(),
    )
    return plan, draft.has_loosened and any(_waits_for_cpus(turn) for turn in turns)


def _waits_for_cpus(turn: Turn) -> bool:
    return turn.key.ask.shape.is_cpu_only and any(why.reason in WAITING_HELPS for _, why in turn.whys)


class _Holds:
    """Hold groups with the place of their first job in the queue."""

    def __init__(self) -> None:
        self._groups: list[tuple[Rank, HoldGroup]] = []

    def add(self, rank: Rank, group: HoldGroup) -> None:
        self._groups.append((rank, group))

    def in_order(self) -> tuple[HoldGroup, ...]:
        self._groups.sort(key=itemgetter(0))
        return tuple(group for _, group in self._groups)


class _Counter:
    """Serves the queue, one job after the other."""

    def __init__(self, draft: Draft, holds: _Holds) -> None:
        self._draft, self._holds, self._now = draft, holds, draft.world.now
        self._lending = Lending(draft)
        self._desk = Desk(draft, self._lending)
        self._expected: dict[str, float] = {}

    def serve(self, turns: Sequence[Turn]) -> None:
        """Settle them all. Jobs of one class ask for the same, and what is free now only shrinks: once one has to wait
        for room, so have those after it, unless they are gone again before what is reserved begins. What else may still
        differ is what is reserved for them."""
        order = self._in_order(turns)
        for turn in order:
            if not turn.may_be_tried(self._now):
                self._wait(turn, order)
            elif (why := self._desk.refuse(turn.group)) is not None:
                turn.hold(why)
            elif not turn.is_deferred and self._desk.borrows(turn.group):
                order.defer(turn)
            else:
                self._settle(turn, order)

    def _in_order(self, turns: Sequence[Turn]) -> Turns | FairTurns:
        if self._draft.world.policy.fair_sharing:
            return FairTurns((t for t in turns if not self._hold_hopeless(t)), self._draft, self._desk.demand)
        return Turns(turns)

    def _hold_hopeless(self, turn: Turn) -> bool:
        why = self._desk.refuse(turn.group)
        if why is not None:
            turn.hold(why)
        return why is not None

    def _settle(self, turn: Turn, order: Turns | FairTurns) -> None:
        bid, options = turn.bid, self._desk.options(turn.group)
        answer = self._desk.decide(bid, options)
        if isinstance(answer, Refusal):
            turn.hold(answer.why, answer.unless)
            self._wait(turn, order)
            return
        if isinstance(answer, Spot):
            self._draft.start(bid, answer)
        else:
            if answer.room is not None:
                self._draft.make(answer.room, bid.job)
            self._draft.keep(bid, answer.spot)
            self._holds.add(turn.rank, hold_for(self._draft, bid.job, answer.spot))
        turn.settle()
        order.again(turn)

    def _wait(self, turn: Turn, order: Turns | FairTurns) -> None:
        """The member whose turn it is waits. As long as starts may be reserved, each has a turn for that."""
        if self._reserve(turn):
            order.again(turn)
        elif turn.skip_tried(self._now):
            order.return_to(turn)

    def _reserve(self, turn: Turn) -> bool:
        """Reserve a start for the member whose turn it is; False if none can or may be."""
        draft, why, options = self._draft, turn.whys[-1][1], self._desk.options(turn.group)
        may_reserve = draft.world.policy.backfill and len(draft.reservations) < MOST_RESERVATIONS
        may_reserve &= is_due(draft.world.policy, turn.bid, self._now)
        starts_at = None
        if may_reserve and why.reason in WAITING_HELPS:
            starts_at = reserve(draft, turn.bid, options)
        self._lending.want(turn, options, starts_at)
        if starts_at is None:
            return False
        self._expected[turn.member.id], turn.has_reserved = starts_at, True
        return True

    def tell(self, turns: Iterable[Turn]) -> None:
        """Hold who waits: those with an expected start of their own, and the others together."""
        for turn in turns:
            for rank, why, jobs in turn.waiting():
                for job in jobs if turn.has_reserved else ():
                    if job in self._expected:
                        self._holds.add(rank, HoldGroup((job,), why, expected_start=self._expected[job]))
                others = [job for job in jobs if job not in self._expected] if turn.has_reserved else jobs
                if others:
                    self._holds.add(rank, HoldGroup(others, why))


def _next_changes(draft: Draft) -> dict[str | None, float]:
    """By cluster, when the pass expects the next end or start."""
    world, names = draft.world, draft.table.names
    changes = [(at, world.running[id_].load) for at, id_ in world.upcoming_ends() if id_ not in draft.disturbed]
    changes += [(at, draft.taken[id_]) for at, id_ in draft.ends]
    changes += [(r.starts_at, r.load) for r in draft.reservations]
    first: dict[str | None, float] = {}
    for at, load in changes:
        cluster = world.nodes[names[load.columns[0]]].cluster if load.columns else None
        first[cluster] = min(at, first.get(cluster, at))
    return first


@dataclass(frozen=True, slots=True)
class Size:
    """What a planner holds in memory. `jobs` run or wait; those that wait are in `classes`, of which each is considered
    once in a pass."""

    jobs: int = 0
    nodes: int = 0
    classes: int = 0


class Planner:
    """A world kept in memory: give it what changed, get the plan for all of it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._world = World(snapshot)

    @property
    def size(self) -> Size:
        return Size(len(self._world.jobs), len(self._world.nodes), len(self._world.queue.classes()))

    def plan(self) -> Plan:
        """The plan for things as they are."""
        return _settled(self._world)

    def apply(self, changes: Changes) -> Plan:
        """Take changes in and plan."""
        self._world.absorb(changes)
        return self.plan()

    def what_if(self, changes: Changes) -> Plan:
        """The plan that changes would lead to; nothing is taken in."""
        undo = self._world.undo_of(changes)
        try:
            return self.apply(changes)
        finally:
            self._world.absorb(undo)

    def snapshot(self) -> Snapshot:
        """Things as they are, as a snapshot: to replay a pass, or to compare with a fresh one."""
        return self._world.snapshot()
