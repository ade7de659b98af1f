"""Owns the snapshot: everything that one scheduling pass may know, as frozen values, and its JSON form (plan-format).

Refuses to know what a pass does with the values and where they were loaded from. Building a value checks nothing; only
`parse_snapshot` and `parse_changes` do, and everything wrong with a document is a ValueError of one line.
Times are seconds since the Unix epoch; `cpus` and `memory_gib` are whole numbers; None means "not given", never zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field

from phalanx_server.scheduling.consistency import check_snapshot
from phalanx_server.scheduling.documents import read_record, write_record

Count = Annotated[int, Field(ge=0, strict=True)]
Size = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]

NodeState = Literal["ready", "cordoned", "draining", "lost"]
RunState = Literal["queued", "running", "stopping"]


class _Record:
    """A value that can be read from JSON and has no fields but its own."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(_Record):
    """What may be switched: see plan-format, `policy`."""

    fair_sharing: Switch = False
    backfill: Switch = True
    consolidation: Switch = False
    elastic: Switch = True
    order: Literal["fifo", "shortest"] = "fifo"
    preempt_longer: Switch = False
    topology_levels: tuple[str, ...] = ()
    share_nodes: Literal["all", "tenant", "none"] = "all"
    usage_half_life_s: Number = 604_800.0
    default_time_limit_s: Number | None = None
    restart_s: Number = 30.0


RECOMMENDED = Policy(order="shortest", preempt_longer=True)
"""What `phalanx simulate` follows unless it is told otherwise (decision 22). A snapshot that says nothing means
`Policy()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota(_Record):
    """Of one GPU type, or of `cpu` or `memory_gib`, for one tenant. No borrowing or lending limit = unlimited."""

    nominal: Count
    borrowing_limit: Count | None = None
    lending_limit: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowRule(_Record):
    """Whom a job may evict in order to borrow: victims of at most this priority, and below its own."""

    max_priority: Whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption(_Record):
    """Whom a tenant's jobs may evict."""

    within_tenant: Literal["never", "lower_priority", "lower_or_newer_equal"] = "lower_priority"
    reclaim: Literal["never", "lower_priority", "any"] = "any"
    borrow: BorrowRule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant(_Record):
    """One tenant of the tree; `parent` None = a root, and roots do not lend to each other."""

    name: str
    parent: str | None = None
    weight: Number = 1.0
    usage: Mapping[str, Number] = field(default_factory=dict)
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    preemption: Preemption = field(default_factory=Preemption)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(_Record):
    """What a node has, not what is free on it. `cpus` or `memory_gib` None = not limited there."""

    name: str
    gpu_type: str
    gpus: Count
    cluster: str | None = None
    cpus: Count | None = None
    memory_gib: Count | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    state: NodeState = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenance(_Record):
    """A window in which nothing runs on these nodes."""

    nodes: tuple[str, ...]
    starts_at: Number
    ends_at: Number


@dataclass(frozen=True, slots=True)
class PlacementItem(_Record):
    """So many replicas of one job on one node."""

    node: str
    replicas: Size


def replicas_in(placement: Sequence[PlacementItem]) -> int:
    """How many replicas there are on all nodes together."""
    return sum(item.replicas for item in placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat(_Record):
    """A whole gang's place: where a stopping job goes on (`next`), or what is kept for a queued one (`kept`)."""

    placement: tuple[PlacementItem, ...]
    gpu_type: str | None = None

    @property
    def placed(self) -> int:
        """How many replicas have their place there."""
        return replicas_in(self.placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependency(_Record):
    """A condition on another job that is still unmet."""

    job: str
    on: Literal["ok", "any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLimit(_Record):
    """The array that a job belongs to; `max_running` None = no limit."""

    id: str
    max_running: Size | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice(_Record):
    """Each so many replicas stay together within one domain of this level."""

    level: str
    replicas: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology(_Record):
    """Exactly one of `required` and `preferred` names a level of `policy.topology_levels`, or "node"."""

    required: str | None = None
    preferred: str | None = None
    slice: Slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(_Record):
    """One job that waits, runs or stops. The fields are those of plan-format; `for_job` is its `for`."""

    id: str
    tenant: str
    replicas: Size
    gpus_per_replica: Count
    submitted_at: Number
    state: RunState
    priority: Whole = 0
    gpu_types: tuple[str, ...] = ()
    gpu_type: str | None = None
    cpus_per_replica: Count = 0
    memory_gib_per_replica: Count = 0
    min_replicas: Size | None = None
    max_replicas: Size | None = None
    speedup: Mapping[str, Number] | None = None
    topology: Topology | None = None
    not_before: Number | None = None
    deadline: Number | None = None
    delay_until: Number | None = None
    kept: Seat | None = None
    after: tuple[Dependency, ...] = ()
    held: Switch = False
    backoff_until: Number | None = None
    array: ArrayLimit | None = None
    avoid_nodes: tuple[str, ...] = ()
    time_limit_s: Number | None = None
    predicted_s: Number | None = None
    done_s: Number = 0.0
    preemptible: Switch = True
    protected_until: Number | None = None
    started_at: Number | None = None
    last_resized_at: Number | None = None
    checkpointed_at: Number | None = None
    placement: tuple[PlacementItem, ...] = ()
    for_job: Annotated[str | None, Field(alias="for")] = None
    next: Seat | None = None

    @property
    def placed(self) -> int:
        """How many replicas it runs with, or stops with."""
        return replicas_in(self.placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(_Record):
    """All that a pass may know. The order of the lists means nothing."""

    now: Number
    policy: Policy = field(default_factory=Policy)
    tenants: tuple[Tenant, ...] = ()
    nodes: tuple[Node, ...] = ()
    maintenance: tuple[Maintenance, ...] = ()
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes(_Record):
    """What became different since a snapshot. `jobs` and `nodes` replace those of the same id or name, or are new;
    `tenants`, `policy` and `maintenance` replace all of theirs, None = as before. A job that ended is removed."""

    now: Number
    jobs: tuple[Job, ...] = ()
    removed_jobs: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    removed_nodes: tuple[str, ...] = ()
    tenants: tuple[Tenant, ...] | None = None
    policy: Policy | None = None
    maintenance: tuple[Maintenance, ...] | None = None


def time_limit_of(job: Job, policy: Policy) -> float | None:
    """The seconds after which an attempt of a job, the one that runs or the next one, is stopped: what its earlier ones
    left of its time limit, at least none; None = never."""
    limit_s = policy.default_time_limit_s if job.time_limit_s is None else job.time_limit_s
    return None if limit_s is None else max(0.0, limit_s - job.done_s)


def changed(snapshot: Snapshot, changes: Changes) -> Snapshot:
    """The snapshot after the changes."""
    return replace(
        snapshot,
        now=changes.now,
        policy=snapshot.policy if changes.policy is None else changes.policy,
        tenants=snapshot.tenants if changes.tenants is None else changes.tenants,
        maintenance=snapshot.maintenance if changes.maintenance is None else changes.maintenance,
        nodes=_merged({n.name: n for n in snapshot.nodes}, {n.name: n for n in changes.nodes}, changes.removed_nodes),
        jobs=_merged({j.id: j for j in snapshot.jobs}, {j.id: j for j in changes.jobs}, changes.removed_jobs),
    )


_Row = TypeVar("_Row", Node, Job)


def _merged(old: dict[str, _Row], new: dict[str, _Row], removed: Sequence[str]) -> tuple[_Row, ...]:
    rows = old | new
    for name in removed:
        rows.pop(name, None)
    return tuple(rows.values())


def spread(placement: Sequence[PlacementItem]) -> dict[str, int]:
    """Replicas by node."""
    out: dict[str, int] = {}
    for item in placement:
        out[item.node] = out.get(item.node, 0) + item.replicas
    return out


def parse_snapshot(document: Any) -> Snapshot:
    """The snapshot that a JSON document says; null means absent. ValueError: one line that names the field."""
    snapshot = read_record(Snapshot, document)
    check_snapshot(snapshot)
    return snapshot


def parse_changes(document: Any) -> Changes:
    """Changes from JSON, as `parse_snapshot`. `checked(changed(snapshot, changes))` checks what they refer to."""
    return read_record(Changes, document)


def checked(snapshot: Snapshot) -> Snapshot:
    """The same snapshot. ValueError if its parts do not agree, e.g. after changes that came from outside."""
    check_snapshot(snapshot)
    return snapshot


def dump_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """The JSON document of a snapshot; whatever has its default value is left out."""
    return write_record(snapshot)
