"""Owns the queue: classes of jobs that ask for the same, kept in order between passes.

Refuses to know what is free. Jobs of one tenant that ask for the same, with the same priority and the same gates, are
one class: a pass considers its head, and once that does not fit none of the others can, because within a pass what is
free only shrinks. (But for a few: see `turns.Unless`.)

The order: a request within nominal before one that borrows, then priority, then the tenant's own order, then the oldest
submission, then the id. (Under fair sharing the share of the tenants comes before the priority: see `fair`.)

A tenant's own order is `fifo`, or `shortest`: by submission plus `AGING` seconds for each GPU-second that the job is
expected to need. So a job may be overtaken only by jobs that are submitted within `AGING` × its GPU-seconds after it:
that bounds its wait, whatever comes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from operator import attrgetter
from typing import NamedTuple
from weakref import WeakValueDictionary

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
    """What queued jobs have in common that ask a pass for the same."""

    tenant: str
    priority: int
    ask: Ask
    gates: Gates
    preemptible: bool


class Member(NamedTuple):
    """A queued job within its class; the smallest is first. `order_at`: its place in the tenant's own order. `run_s`:
    how long it is expected to run, infinite if nobody knows."""

    order_at: float
    submitted_at: float
    id: str
    run_s: float


Rank = tuple[int, float, float, str]
"""A place in the queue; the smallest is first."""


@dataclass(frozen=True, slots=True)
class Bid:
    """One queued job at its turn."""

    key: ClassKey
    job: str
    submitted_at: float
    run_s: float
    order_at: float

    @property
    def behind_s(self) -> float:
        """How far behind its submission it stands in its tenant's own order."""
        return self.order_at - self.submitted_at


class JobClass:
    """The queued jobs of one class, in their tenant's order; at least one. `options` belongs to `possible`."""

    __slots__ = ("_ids", "_rank", "key", "members", "options")

    def __init__(self, key: ClassKey) -> None:
        self.key = key
        self.options: object = None
        self.members: list[Member] = []
        self._ids: tuple[str, ...] | None = None
        self._rank: Rank | None = None

    def add(self, member: Member) -> None:
        """Take a job in, at its place."""
        insort(self.members, member)
        self._ids = self._rank = None

    def remove(self, member: Member) -> None:
        """Let a job go that is in the class."""
        del self.members[bisect_left(self.members, member)]
        self._ids = self._rank = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        if self._ids is None:
            self._ids = tuple(member.id for member in self.members)
        return self._ids

    @property
    def rank(self) -> Rank:
        """Where its first member stands in the queue."""
        if self._rank is None:
            self._rank = rank_of(self.key, self.members[0])
        return self._rank


class Queue:
    """All queued jobs by class. `run_limits_matter`: only then do other time limits mean other places to run."""

    def __init__(self, policy: Policy, *, run_limits_matter: bool) -> None:
        self._policy = policy
        self._run_limits_matter = run_limits_matter
        self._classes: dict[ClassKey, JobClass] = {}
        self._in_order: list[JobClass] = []
        self._new: list[JobClass] = []
        self._asks: WeakValueDictionary[tuple[object, ...], Ask] = WeakValueDictionary()

    def add(self, job: Job) -> None:
        """Take in a queued job."""
        key = self.key_of(job)
        group = self._classes.get(key)
        if group is None:
            group = self._classes[key] = JobClass(key)
            self._new.append(group)
        group.add(self._member(job))

    def remove(self, job: Job) -> None:
        """Let a job go, which is given as it was added."""
        key = self.key_of(job)
        self._classes[key].remove(self._member(job))
        if not self._classes[key].members:
            del self._classes[key]

    def classes(self) -> Sequence[JobClass]:
        """All classes in the order of the queue, by their first members. Not to be changed."""
        if any(not group.members for group in self._in_order) or self._new:
            self._in_order = [group for group in (*self._in_order, *self._new) if group.members]
            self._new = []
        self._in_order.sort(key=attrgetter("rank"))
        return self._in_order

    def bid_of(self, job: Job) -> Bid:
        """What a queued job asks for."""
        order_at, submitted_at, id_, run_s = self._member(job)
        return Bid(self.key_of(job), id_, submitted_at, run_s, order_at)

    def rank_of(self, job: Job) -> Rank:
        """Where a queued job stands."""
        return rank_of(self.key_of(job), self._member(job))

    def _member(self, job: Job) -> Member:
        run_s = self._run_s(job)
        behind_s = order_s(self._policy, run_s, job.replicas * max(1, job.gpus_per_replica))
        return Member(job.submitted_at + behind_s, job.submitted_at, job.id, run_s)

    def key_of(self, job: Job) -> ClassKey:
        """The class that a queued job belongs to."""
        gates = Gates(job.held, job.after, job.array, job.not_before, job.backoff_until, job.delay_until)
        return ClassKey(
            tenant=job.tenant,
            priority=job.priority,
            ask=self._ask_of(job),
            gates=NO_GATES if gates == NO_GATES else gates,
            preemptible=job.preemptible,
        )

    def _run_s(self, job: Job) -> float:
        """What is left to run as predicted, at most its time limit."""
        limit_s = time_limit_of(job, self._policy)
        most_s = inf if limit_s is None else limit_s
        if job.predicted_s is None or job.predicted_s <= job.done_s:
            return most_s
        return min(job.predicted_s - job.done_s, most_s)

    def _ask_of(self, job: Job) -> Ask:
        limit = time_limit_of(job, self._policy)
        values = (
            Shape(job.gpus_per_replica, job.cpus_per_replica, job.memory_gib_per_replica),
            job.replicas,
            least_replicas(job),
            job.gpu_types,
            tuple(sorted(job.avoid_nodes)),
            limit if self._run_limits_matter else None,
            job.topology,
        )
        ask = self._asks.get(values)
        if ask is None:
            ask = self._asks[values] = Ask(*values)
        return ask


def order_s(policy: Policy, run_s: float, gpus: int) -> float:
    """How far behind its submission a job stands in its tenant's own order that still runs so long."""
    return 0.0 if policy.order == "fifo" else AGING * (UNKNOWN_RUN_S if run_s == inf else run_s) * gpus


def least_replicas(job: Job) -> int:
    """With how many replicas it may run at least, in whole slices."""
    step = job.topology.slice.replicas if job.topology and job.topology.slice else 1
    return -(-(job.min_replicas or job.replicas) // step) * step


def rank_of(key: ClassKey, member: Member) -> Rank:
    """The place of a member of a class."""
    return -key.priority, member.order_at, member.submitted_at, member.id
