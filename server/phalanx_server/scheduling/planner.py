"""Owns the pass: a snapshot in, a plan out; and the planner that the live scheduler keeps, which takes changes instead.

Refuses to know the clock, the database and what becomes of the plan. The same snapshot always gives the same plan, in
whatever order its lists are, and `Planner.apply` gives what `schedule` gives on the whole.

What this version does not act upon yet, although it reads it: it evicts, shrinks, grows and moves nobody
(`preemption`, `preemptible`, `protected_until`, `consolidation`, draining nodes just take nothing new); it reserves
nothing for a job that waits for room, so that any job that fits starts (`backfill`, `predicted_s`, `done_s`,
`deadline`), and the start that it expects for a job that waits for room or quota looks no further than the next time
limits of running jobs (`expect`); it orders as `fifo` without
fair sharing (`order`, `fair_sharing`, `weight`, `usage`). An elastic job starts with exactly `replicas`. A gang with
required topology or slices starts on a single node, which meets any of them, or is held with `topology`; a preference
is ignored.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from phalanx_server.domain.reason import Explanation
from phalanx_server.scheduling.decide import Desk
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.expect import expected_starts
from phalanx_server.scheduling.honour import honour_claims
from phalanx_server.scheduling.order import Turn, Turns, turn_of
from phalanx_server.scheduling.plan import HoldGroup, Plan
from phalanx_server.scheduling.snapshot import Changes, Snapshot
from phalanx_server.scheduling.world import World


def schedule(snapshot: Snapshot) -> Plan:
    """The plan for a snapshot:

    1. Honour first what is kept for waiting jobs, and what others stop for.
    2. Refuse whoever could not start even first: impossible, before a closed gate, over quota, without room.
    3. Let the others take their turns: who still fits in quota and on nodes starts, who does not is told why.
    4. Let CPU jobs try again if GPU jobs started, which may have taken less than their share of CPUs.
    5. Look ahead for the jobs at the head of the queue: when will room be made for them?
    """
    return _run(World(snapshot))


def _run(world: World) -> Plan:
    draft, holds = Draft(world), _Holds()
    settled = honour_claims(draft)
    for job, hold in settled:
        if hold is not None:
            holds.add((-job.priority, job.submitted_at, job.id), hold)
    done = {job.id for job, _ in settled}
    turns = [turn_of(group, done) for group in world.queue.classes()]
    waiting = _take_turns(draft, [turn for turn in turns if turn is not None])
    if draft.has_loosened:
        again = [turn for turn, _ in waiting if turn.key.ask.shape.is_cpu_only]
        waiting = [w for w in waiting if not w[0].key.ask.shape.is_cpu_only] + _take_turns(draft, again)
    expected = expected_starts(draft, waiting)
    for turn, why in waiting:
        for group in _groups(turn, why, expected):
            holds.add(turn.rank, group)
    return Plan(starts=tuple(draft.starts), hold_groups=holds.in_order())


def _groups(turn: Turn, why: Explanation, expected: Mapping[str, float]) -> Iterator[HoldGroup]:
    """The waiting jobs of a class: those with an expected start of their own, then the others."""
    jobs = turn.waiting
    head = list(takewhile(expected.__contains__, jobs))
    for job in head:
        yield HoldGroup((job,), why, expected_start=expected[job])
    if len(head) < len(jobs):
        yield HoldGroup(jobs[len(head) :] if head else jobs, why)


class _Holds:
    """Hold groups with the place of their first job in the queue."""

    def __init__(self) -> None:
        self._groups: list[tuple[tuple[int, float, str], HoldGroup]] = []

    def add(self, rank: tuple[int, float, str], group: HoldGroup) -> None:
        self._groups.append((rank, group))

    def in_order(self) -> tuple[HoldGroup, ...]:
        return tuple(group for _, group in sorted(self._groups, key=lambda entry: entry[0]))


def _take_turns(draft: Draft, turns: Sequence[Turn]) -> list[tuple[Turn, Explanation]]:
    """Start who fits. Gives each class that has jobs left, with what holds them: what is free only shrinks, so once one
    does not fit, the identical ones after it do not either."""
    desk = Desk(draft)
    waiting: list[tuple[Turn, Explanation]] = []
    hopeful: list[Turn] = []
    for turn in turns:
        why = desk.refuse(turn.group)
        if why is None:
            hopeful.append(turn)
        else:
            waiting.append((turn, why))
    order = Turns(hopeful)
    for turn in order:
        why = desk.refuse(turn.group)
        if why is None and not turn.is_deferred and desk.borrows(turn.group):
            order.defer(turn)
            continue
        answer = why or desk.decide(turn.group)
        if isinstance(answer, Explanation):
            waiting.append((turn, answer))
        else:
            draft.start(turn.job, turn.key, answer)
            order.again(turn)
    return waiting


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
        return _run(self._world)

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
