"""Owns the queue: classes of identical jobs, kept in order between passes, and whose turn it is within one.

Refuses to know what is free. Jobs of one tenant that ask for the same, with the same priority and the same gates, are
one class: a pass considers its head, and once that does not fit none of the others can, because within a pass what is
free only shrinks.

The order: a request within nominal before one that borrows, then priority, then the oldest submission, then the id.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from weakref import WeakValueDictionary

from phalanx_server.domain.resources import Shape
from phalanx_server.scheduling.snapshot import ArrayLimit, Dependency, Job


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Ask:
    """What a job asks of the nodes. A queue has one object for all that ask for the same, so that they compare quickly.

    `run_limit_s` None: it may run for ever. `bound_to`: a topology level that it must keep to. `least_replicas` is
    `replicas`, or the minimum of an elastic job.
    """

    shape: Shape
    replicas: int
    least_replicas: int
    gpu_types: tuple[str, ...]
    avoid_nodes: tuple[str, ...]
    run_limit_s: float | None
    bound_to: str | None

    def describe(self, gpu_type: str | None = None) -> str:
        """For people: `2 × (8 h100)`."""
        named = gpu_type or " or ".join(self.gpu_types) or None
        return f"{self.replicas} × ({self.shape.describe(named)})"


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


@dataclass(frozen=True, slots=True)
class ClassKey:
    """What makes two queued jobs identical to a pass."""

    tenant: str
    priority: int
    ask: Ask
    gates: Gates


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
    """All queued jobs by class. `run_limits_matter`: only then do jobs with other time limits differ."""

    def __init__(self, *, default_run_limit_s: float | None, run_limits_matter: bool) -> None:
        self._default_run_limit_s = default_run_limit_s
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
        return ClassKey(job.tenant, job.priority, self._ask_of(job), NO_GATES if gates == NO_GATES else gates)

    def _ask_of(self, job: Job) -> Ask:
        limit = self._default_run_limit_s if job.time_limit_s is None else job.time_limit_s
        values = (
            Shape(job.gpus_per_replica, job.cpus_per_replica, job.memory_gib_per_replica),
            job.replicas,
            job.min_replicas or job.replicas,
            job.gpu_types,
            tuple(sorted(job.avoid_nodes)),
            limit if self._run_limits_matter else None,
            _bound_to(job),
        )
        ask = self._asks.get(values)
        if ask is None:
            ask = self._asks[values] = Ask(*values)
        return ask


def _bound_to(job: Job) -> str | None:
    if job.topology is None:
        return None
    return job.topology.required or (job.topology.slice.level if job.topology.slice else None)


@dataclass(slots=True)
class Turn:
    """A class within one pass; `at` is the member whose turn it is, `number` the class's own in `Turns`."""

    group: JobClass
    members: Sequence[tuple[float, str]]
    number: int = 0
    at: int = 0
    is_deferred: bool = False

    @property
    def key(self) -> ClassKey:
        return self.group.key

    @property
    def job(self) -> str:
        return self.members[self.at][1]

    @property
    def rank(self) -> tuple[int, float, str]:
        """Where the member whose turn it is stands in the queue, apart from borrowing."""
        return -self.group.key.priority, *self.members[self.at]

    @property
    def waiting(self) -> Sequence[str]:
        """The ids of this member and those after it."""
        if self.members is self.group.members:
            return self.group.ids[self.at :]
        return [id_ for _, id_ in self.members[self.at :]]


def turn_of(group: JobClass, settled: Set[str]) -> Turn | None:
    """The class's turn, leaving out the jobs that are settled already; None if that is all of them."""
    if settled and not settled.isdisjoint(group.ids):
        members = [m for m in group.members if m[1] not in settled]
        return Turn(group, members) if members else None
    return Turn(group, group.members)


class Turns:
    """Whose turn it is: one entry per class. Whoever is given a turn says what became of it: `again`, `defer`, or
    nothing, and then the class is out."""

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
        """Its member started: the class comes again with the next one, if there is one."""
        turn.at += 1
        if turn.at < len(turn.members):
            self._push(turn)

    def defer(self, turn: Turn) -> None:
        """It borrows: the class comes again after all that stay within nominal."""
        turn.is_deferred = True
        self._push(turn)

    def _push(self, turn: Turn) -> None:
        heapq.heappush(self._heap, (turn.is_deferred, *turn.rank, turn.number))
