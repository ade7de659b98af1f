"""What the API answers, as frozen dataclasses. It owns the shapes and how they are read from JSON; it refuses to know
HTTP.

Reading is tolerant: keys that a newer server added are ignored (`raw` keeps the whole answer), a missing key takes the
field's default. Times are aware datetimes in UTC; durations are seconds and sizes are bytes, as their names say.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from phalanx.errors import ProtocolError

M = TypeVar("M", bound="Model")

STATES = ("queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled")
TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Model:
    """Base of all answers."""

    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    @classmethod
    def from_json(cls: type[M], data: Any) -> M:
        """Read one answer; ProtocolError names what is missing or of another type."""
        if not isinstance(data, dict):
            raise ProtocolError(f"expected {cls.__name__} as a JSON object, the server sent {type(data).__name__}")
        values = {
            name: _read(kind, data[name], f"{cls.__name__}.{name}") for name, kind in _fields(cls) if name in data
        }
        try:
            return cls(**values, raw=data)
        except TypeError as error:
            raise ProtocolError(f"the server sent an incomplete {cls.__name__}: {error}") from None


@functools.cache
def _fields(cls: type) -> list[tuple[str, Any]]:
    kinds = typing.get_type_hints(cls)
    return [(f.name, kinds[f.name]) for f in dataclasses.fields(cls) if f.name != "raw"]


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(a for a in args if a is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [_read(args[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _read(args[1], item, where) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Model):
        return kind.from_json(value)
    if kind is datetime:
        return _read_time(value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ProtocolError(f"{where} of the answer is {value!r}: expected {getattr(kind, '__name__', kind)}")


def _read_time(value: Any, where: str) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ProtocolError(f"{where} of the answer is {value!r}: expected an RFC 3339 time") from None


# ------------------------------------------------------------------ jobs


@dataclass(frozen=True)
class Hold(Model):
    """Why a job waits, and what would end the wait."""

    reason: str
    message: str = ""
    unblocks: list[Any] = field(default_factory=list)
    estimated_start: datetime | None = None
    estimated_start_low: datetime | None = None
    estimated_start_high: datetime | None = None
    since: datetime | None = None


@dataclass(frozen=True)
class Phases(Model):
    """Submit to first optimizer step, in parts that add up to `total_s`. Null: not reached, or not known."""

    accepted_s: float | None = None
    queued_s: float | None = None
    placed_s: float | None = None
    ranks_started_s: float | None = None
    rendezvous_s: float | None = None
    first_step_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True)
class Placement(Model):
    """The replicas of an attempt that share a node: ranks `first_rank .. first_rank + ranks - 1`."""

    node: str
    replicas: int = 0
    gpu_indices: list[int] = field(default_factory=list)
    first_rank: int = 0
    ranks: int = 0
    address: str = ""


@dataclass(frozen=True)
class RankStart(Model):
    rank: int
    node: str = ""
    pid: int = 0
    warm: bool = False
    cold_reason: str = ""


@dataclass(frozen=True)
class RankExit(Model):
    """How a rank ended: by exit code or by signal; both null where nobody saw it."""

    rank: int
    exit_code: int | None = None
    signal: int | None = None
    ended_at: Any = None
    oom: bool = False
    tail: str = ""
    reason: str = ""  # why its node ended it, in words that follow its name
    fault: str = ""  # `hang`, `health` or `preflight`, where a check ended it
    final: bool = False  # and the job was not to be tried again


@dataclass(frozen=True)
class NextItem(Model):
    node: str
    replicas: int = 0


@dataclass(frozen=True)
class Next(Model):
    """Where a job goes on that is resized or moved."""

    gpu_type: str | None = None
    placement: list[NextItem] = field(default_factory=list)


@dataclass(frozen=True)
class Attempt(Model):
    """One try at running a job."""

    id: str
    number: int = 1
    epoch: int = 0
    state: str = ""
    outcome: str | None = None
    message: str | None = None
    cluster: str | None = None
    gpu_type: str | None = None
    replicas: int = 0
    resume_from: str | None = None
    created_at: datetime | None = None
    gang_ready_at: datetime | None = None
    started_at: datetime | None = None
    rendezvous_at: datetime | None = None
    first_step_at: datetime | None = None
    ended_at: datetime | None = None
    stop_cause: str | None = None
    stop_reason: str | None = None
    stop_for: str | None = None
    next: Next | None = None
    placements: list[Placement] = field(default_factory=list)
    ranks: list[RankStart] = field(default_factory=list)
    exits: list[RankExit] = field(default_factory=list)
    phases: Phases | None = None


@dataclass(frozen=True)
class Progress(Model):
    """The latest that the job reported about itself. A value that is not finite comes as a string."""

    step: int | None = None
    total_steps: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    at: datetime | None = None


@dataclass(frozen=True)
class Speed(Model):
    """Progress per second of an elastic job with so many replicas; `relative` to one. Null `per_s`: an earlier job of
    the same name was measured."""

    replicas: int
    gpu_type: str | None = None
    per_s: float | None = None
    unit: str | None = None
    relative: float | None = None
    measured_s: float = 0.0


@dataclass(frozen=True)
class Checkpoint(Model):
    url: str
    step: int | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class ArrayPlace(Model):
    """Which job of which array it is."""

    id: str
    index: int
    size: int = 1
    max_running: int | None = None


@dataclass(frozen=True)
class Job(Model):
    id: str
    name: str = ""
    tenant: str = ""
    state: str = ""
    reason: str | None = None
    message: str | None = None
    priority: int = 0
    spec: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    received_at: datetime | None = None
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    held: bool = False
    hold: Hold | None = None
    position: int | None = None
    attempts: int = 0
    failures: int = 0
    attempt: Attempt | None = None
    progress: Progress | None = None
    speeds: list[Speed] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    phases: Phases | None = None
    bundle: str | None = None
    created_by: str = ""
    version: int = 0
    array: ArrayPlace | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def doing(self) -> str:
        return self.state

    @property
    def gpus(self) -> int:
        """GPUs of the whole gang: those that it has, or asks for while it waits."""
        asked = self.spec.get("resources") or {}
        return self._replicas * int(asked.get("gpus_per_replica") or 0)

    @property
    def ranks(self) -> int:
        """The world size: ranks of the whole gang."""
        asked = self.spec.get("resources") or {}
        each = asked.get("ranks_per_replica") or asked.get("gpus_per_replica") or 1
        return self._replicas * int(each)

    @property
    def _replicas(self) -> int:
        """An elastic job may run with another number than it asked for."""
        if self.state != "queued" and self.attempt is not None and self.attempt.replicas:
            return self.attempt.replicas
        return int((self.spec.get("resources") or {}).get("replicas") or 1)


@dataclass(frozen=True)
class ArrayStatus(Model):
    """The jobs of one submit that carry an index, and how many are in which state."""

    id: str
    name: str = ""
    tenant: str = ""
    size: int = 0
    indices: str = ""
    max_running: int | None = None
    states: dict[str, int] = field(default_factory=dict)
    held: int = 0
    ended: bool = False
    created_by: str = ""
    submitted_at: datetime | None = None

    @property
    def doing(self) -> str:
        """`3 queued, 2 running`."""
        return ", ".join(f"{self.states[state]} {state}" for state in STATES if state in self.states)


@dataclass(frozen=True)
class Event(Model):
    """Something that happened to a job. `id` orders events and is the SSE id."""

    id: int
    kind: str
    at: datetime
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    attempt: str | None = None
    node: str | None = None


@dataclass(frozen=True)
class LogLine(Model):
    """A piece of one stream of one rank; `text` may hold many lines."""

    rank: int
    stream: str
    text: str
    attempt: int = 1
    at: datetime | None = None


@dataclass(frozen=True)
class Point(Model):
    """A bucket of a series. A value that is not finite comes as a string or null."""

    at: datetime
    step: int | None = None
    min: Any = None
    max: Any = None
    mean: Any = None
    count: int = 1


@dataclass(frozen=True)
class Series(Model):
    name: str
    resolution_s: float | None = None
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Would(Model):
    """What the scheduler would do with a job that was only tried."""

    start: bool = False
    hold: Hold | None = None
    placement: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class MemoryOn(Model):
    gpu_type: str
    fits: bool = True
    message: str = ""


@dataclass(frozen=True)
class Memory(Model):
    """What each rank of a recipe is expected to need; `parts_bytes` add up to `total_bytes`."""

    total_bytes: int = 0
    parts_bytes: dict[str, int] = field(default_factory=dict)
    on: list[MemoryOn] = field(default_factory=list)


@dataclass(frozen=True)
class DryRun(Model):
    valid: bool
    spec: dict[str, Any] = field(default_factory=dict)
    would: Would | None = None
    warnings: list[str] = field(default_factory=list)
    memory: Memory | None = None


@dataclass(frozen=True)
class Explanation(Model):
    """Why a job waits, in sentences."""

    job_id: str
    state: str = ""
    hold: Hold | None = None
    position: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Goodput(Model):
    """What became of the GPU time that a job was given; `parts_gpu_s` add up to `allocated_gpu_s`."""

    job_id: str
    attempts: int = 0
    goodput: float | None = None
    allocated_gpu_s: float = 0.0
    parts_gpu_s: dict[str, float] = field(default_factory=dict)
    measured: bool = False


@dataclass(frozen=True)
class QueueItem(Model):
    position: int
    job_id: str
    name: str = ""
    tenant: str = ""
    priority: int = 0
    replicas: int = 0
    gpus_per_replica: int = 0
    submitted_at: datetime | None = None
    hold: Hold | None = None
    array: ArrayPlace | None = None


# ------------------------------------------------------------------ everything else


@dataclass(frozen=True)
class Remaining(Model):
    """A job that still holds something on a draining node: why, and when it is gone at the latest, if anything says."""

    job: str
    why: str = ""
    ends_by: datetime | None = None


@dataclass(frozen=True)
class Suspect(Model):
    """What health checks of several attempts say against a node; `message` is the last of it."""

    attempts: int = 0
    last_at: datetime | None = None
    message: str | None = None


@dataclass(frozen=True)
class Node(Model):
    """`remaining` and `outlook`: of a draining node, what keeps it from being empty."""

    id: str
    name: str
    cluster: str = ""
    state: str = ""
    gpu_type: str = ""
    gpus: int = 0
    gpus_used: int = 0
    cpus: float = 0
    memory_bytes: int = 0
    address: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    alive: bool = True
    warm_ready: bool = False
    own_users: bool = False
    last_seen_at: datetime | None = None
    clock_skew_s: float | None = None
    stats: dict[str, Any] | None = None
    jobs: list[str] = field(default_factory=list)
    suspect: Suspect | None = None
    remaining: list[Remaining] = field(default_factory=list)
    outlook: str | None = None


@dataclass(frozen=True)
class Cluster(Model):
    """A Ray cluster. `token` is its agent's, given once when the cluster is made."""

    name: str
    id: str = ""
    agent_seen_at: datetime | None = None
    created_at: datetime | None = None
    token: str | None = None


@dataclass(frozen=True)
class Quota(Model):
    """GPUs of one type: `nominal` is owned; null limits are unbounded."""

    nominal: int = 0
    borrowing_limit: int | None = None
    lending_limit: int | None = None


@dataclass(frozen=True)
class Tenant(Model):
    path: str
    id: str = ""
    parent: str | None = None
    weight: float = 1.0
    preemption: dict[str, Any] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    version: int = 0


@dataclass(frozen=True)
class Policy(Model):
    """What the scheduler may do, and how it weighs. `policy` is in force; `settings` was set over the settings file."""

    policy: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = 0


@dataclass(frozen=True)
class Token(Model):
    """An API token. `token` is its text, given once when it is made."""

    id: str
    name: str = ""
    role: str = ""
    tenant: str | None = None
    cluster: str | None = None
    user: str | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    token: str | None = None


@dataclass(frozen=True)
class Whoami(Model):
    role: str = ""
    name: str = ""
    user: str | None = None
    tenant: str | None = None
    cluster: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True)
class PlanAnswer(Model):
    """A what-if: the plan that the scheduler would make."""

    plan: dict[str, Any]
    jobs: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    snapshot_at: datetime | None = None


@dataclass(frozen=True)
class ForecastFigures(Model):
    """Forecasts of one kind against what came; 0.8 within the interval is meant."""

    jobs: int = 0
    within_interval: float | None = None
    median_error_s: float | None = None
    median_relative_error: float | None = None


@dataclass(frozen=True)
class CalibrationReport(Model):
    """How good forecasts were: of starts as first told, and of run times."""

    starts: ForecastFigures = field(default_factory=ForecastFigures)
    runs: ForecastFigures = field(default_factory=ForecastFigures)
