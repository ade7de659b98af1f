"""Owns the queue: classes of identical jobs, kept in order between passes, and whose turn it is within one.

Refuses to know what is free. Jobs of one tenant that ask for the same, with the same priority and the same gates, are
one class: a pass considers its head, and once that does not fit none of the others can, because within a pass what is
free only shrinks.

The order: a request within nominal before one that borrows, then priority, then the tenant's own order, then the oldest
submission, then the id. (Under fair sharing the share of the tenants comes before the priority: see `fair`.)

A tenant's own order is `fifo`, or `shortest`: by submission plus `AGING` seconds for each GPU-second that the job is
expected to need. So a job may be overtaken only by jobs that are submitted within `AGING` × its GPU-seconds after it:
that bounds its wait, whatever comes.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from phalanx_server.domain.reason import Explanation
from phalanx_server.domain.resources import Shape
from phalanx_server.scheduling.snapshot import ArrayLimit, Dependency, Job, Policy, Topology, time_limit_of


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Ask:
    """What a job asks of the nodes. A queue has one object for all that ask for the same, so that they compare quickly.

    `run_limit_s` None: it may run for ever. `least_replicas` is `replicas`, or the minimum of an elastic job, in whole
    slices.
    """

    shape: Shape
    replicas: int
    least_replicas: int
    gpu_types: tuple[str, ...]
    avoid_nodes: tuple[str, ...]
    run_limit_s: float | None
    topology: Topology | None

    @property
    def bound(self) -> str:
        """The level of which one domain holds the whole gang; the cluster is the outermost."""
        return self.topology.required or "cluster" if self.topology else "cluster"

    @property
    def slices(self) -> tuple[int, str] | None:
        """(replicas, level): so many replicas at a time stay in one domain of the level."""
        if self.topology is None or self.topology.slice is None:
            return None
        return self.topology.slice.replicas, self.topology.slice.level

    @property
    def step(self) -> int:
        """The gang has a multiple of so many replicas: whole slices."""
        return self.slices[0] if self.slices else 1

    def describe(self, gpu_type: str | None = None) -> str:
        """For people: `2 × (8 h100)`."""
        named = gpu_type or " or ".join(self.gpu_types) or None
        return f"{self.replicas} × ({self.shape.describe(named)})"


def sized(ask: Ask, replicas: int | None) -> Ask:
    """The same for another number of replicas, None = as it is."""
    return ask if replicas is None or replicas == ask.replicas else replace(ask, replicas=replicas)


@dataclass(frozen=True, slots=True)
class Gates:
    """What must open before a job may start, whatever is free."""

    held: bool
    after: tuple[Dependency, ...]
    array: ArrayLimit | None
    not_before: float | None
    backoff_until: float | None
    delay_until: float | None


NO_GATES = Gates(held=False, after=(), array=None, not_before=None, backoff_until=None, delay_until=None)


AGING = 1.0
"""Seconds of head start in the queue that a job loses for each GPU-second that it needs, with `order: shortest`."""

UNKNOWN_RUN_S = 86_400.0
"""What a job without limit and prediction is taken to run, in that order only."""


@dataclass(frozen=True, slots=True)
class ClassKey:
    """What makes two queued jobs identical to a pass. `run_s`: how long it is expected to run, None = nobody knows.
    `order_s`: what its place in the tenant's own order is behind its submission."""

    tenant: str
    priority: int
    ask: Ask
    gates: Gates
    run_s: float | None
    order_s: float
    preemptible: bool


class JobClass:
    """The queued jobs of one class, oldest first. Never empty in a queue. `options` belongs to `possible`."""

    __slots__ = ("_ids", "key", "members", "options")

    def __init__(self, key: ClassKey) -> None:
        self.key = key
        self.options: object = None
        self.members: list[tuple[float, str]] = []
        self._ids: tuple[str, ...] | None = None

    def add(self, job: Job) -> None:
        """Take a job in, at its place."""
        insort(self.members, (job.submitted_at, job.id))
        self._ids = None

    def remove(self, job: Job) -> None:
        """Let a job go that is in the class."""
        del self.members[bisect_left(self.members, (job.submitted_at, job.id))]
        self._ids = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, oldest first."""
        if self._ids is None:
            self._ids = tuple(id_ for _, id_ in self.members)
        return self._ids


class Queue:
    """All queued jobs by class. `run_limits_matter`: only then do other time limits mean other places to run."""

    def __init__(self, policy: Policy, *, run_limits_matter: bool) -> None:
        self._policy = policy
        self._run_limits_matter = run_limits_matter
        self._classes: dict[ClassKey, JobClass] = {}
        self._asks: WeakValueDictionary[tuple[object, ...], Ask] = WeakValueDictionary()

    def add(self, job: Job) -> None:
        """Take in a queued job."""
        key = self.key_of(job)
        if key not in self._classes:
            self._classes[key] = JobClass(key)
        self._classes[key].add(job)

    def remove(self, job: Job) -> None:
        """Let a job go, which is given as it was added."""
        key = self.key_of(job)
        self._classes[key].remove(job)
        if not self._classes[key].members:
            del self._classes[key]

    def classes(self) -> Collection[JobClass]:
        """All classes, in no particular order."""
        return self._classes.values()

    def key_of(self, job: Job) -> ClassKey:
        """The class that a queued job belongs to."""
        gates = Gates(job.held, job.after, job.array, job.not_before, job.backoff_until, job.delay_until)
        run_s = self._run_s(job)
        return ClassKey(
            tenant=job.tenant,
            priority=job.priority,
            ask=self._ask_of(job),
            gates=NO_GATES if gates == NO_GATES else gates,
            run_s=run_s,
            order_s=self._order_s(job, run_s),
            preemptible=job.preemptible,
        )

    def _run_s(self, job: Job) -> float | None:
        """What is left to run as predicted, at most its time limit."""
        limit_s = time_limit_of(job, self._policy)
        if job.predicted_s is None or job.predicted_s <= job.done_s:
            return limit_s
        left_s = job.predicted_s - job.done_s
        return left_s if limit_s is None else min(left_s, limit_s)

    def _order_s(self, job: Job, run_s: float | None) -> float:
        if self._policy.order == "fifo":
            return 0.0
        return AGING * (UNKNOWN_RUN_S if run_s is None else run_s) * job.replicas * max(1, job.gpus_per_replica)

    def _ask_of(self, job: Job) -> Ask:
        limit = time_limit_of(job, self._policy)
        values = (
            Shape(job.gpus_per_replica, job.cpus_per_replica, job.memory_gib_per_replica),
            job.replicas,
            _least_replicas(job),
            job.gpu_types,
            tuple(sorted(job.avoid_nodes)),
            limit if self._run_limits_matter else None,
            job.topology,
        )
        ask = self._asks.get(values)
        if ask is None:
            ask = self._asks[values] = Ask(*values)
        return ask


def _least_replicas(job: Job) -> int:
    step = job.topology.slice.replicas if job.topology and job.topology.slice else 1
    return -(-(job.min_replicas or job.replicas) // step) * step


Rank = tuple[int, float, float, str]
"""A place in the queue; the smallest is first."""


def rank_of(key: ClassKey, submitted_at: float, id_: str) -> Rank:
    """The place of a member of a class."""
    return -key.priority, submitted_at + key.order_s, submitted_at, id_


@dataclass(slots=True)
class Turn:
    """A class within one pass; `at` is the member whose turn it is, `number` the class's own in `Turns`."""

    group: JobClass
    members: Sequence[tuple[float, str]]
    number: int = 0
    at: int = 0
    is_deferred: bool = False
    held_at: int = -1
    why: Explanation | None = None
    """Why the members from `held_at` on wait."""

    @property
    def key(self) -> ClassKey:
        return self.group.key

    @property
    def job(self) -> str:
        return self.members[self.at][1]

    @property
    def submitted_at(self) -> float:
        return self.members[self.at][0]

    @property
    def rank(self) -> Rank:
        """Where the member whose turn it is stands in the queue, apart from borrowing."""
        return self.rank_at(self.at)

    def rank_at(self, at: int) -> Rank:
        """Where another member stands."""
        return rank_of(self.group.key, *self.members[at])

    def hold(self, why: Explanation) -> None:
        """This member and all after it wait: they are identical."""
        self.held_at, self.why = self.at, why

    @property
    def waiting(self) -> Sequence[str]:
        """The ids of the members that are held."""
        if self.members is self.group.members:
            return self.group.ids[self.held_at :]
        return [id_ for _, id_ in self.members[self.held_at :]]


def turn_of(group: JobClass, settled: Set[str]) -> Turn | None:
    """The class's turn, leaving out the jobs that are settled already; None if that is all of them."""
    if settled and not settled.isdisjoint(group.ids):
        members = [m for m in group.members if m[1] not in settled]
        return Turn(group, members) if members else None
    return Turn(group, group.members)


class Turns:
    """Whose turn it is: one entry per class. Whoever is given a turn says what became of it: `again`, `defer`, or
    nothing, and then the class is out. `fair.FairTurns` does the same under fair sharing."""

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._turns = list(turns)
        for i, turn in enumerate(self._turns):
            turn.number = i
        self._heap = [(turn.is_deferred, *turn.rank, turn.number) for turn in self._turns]
        heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Turn]:
        """Each next turn, for as long as there are any."""
        while self._heap:
            yield self._turns[heapq.heappop(self._heap)[-1]]

    def again(self, turn: Turn) -> None:
        """Its member is settled: the class comes again with the next one, if there is one."""
        turn.at += 1
        if turn.at < len(turn.members):
            self._push(turn)

    def defer(self, turn: Turn) -> None:
        """It borrows: the class comes again after all that stay within nominal."""
        turn.is_deferred = True
        self._push(turn)

    def _push(self, turn: Turn) -> None:
        heapq.heappush(self._heap, (turn.is_deferred, *turn.rank, turn.number))
