"""Messages between the worker side (agent, node runners) and the server: plain data, standard library only.

Facts flow up (what ran, where, how it ended), decisions flow down (what should run). Nothing here names a job state:
only the server does that. Every message is a frozen dataclass; `encode` gives its JSON form and `decode` reads it back,
ignoring keys that a newer peer added. Times are seconds since the Unix epoch, of the sender's clock, unless said
otherwise. The server has its own types for the same JSON; `tests/contract/` holds golden files that go through both.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

PROTOCOL_VERSION = 1

T = TypeVar("T")


# ------------------------------------------------------------------ agent -> server


@dataclass(frozen=True)
class NodeFacts:
    """One node as the cluster sees it. `gpus` counts; `memory_bytes` is what ranks may use together."""

    name: str  # stable name of the node inside its cluster
    ray_node_id: str
    gpu_type: str  # "" where there is no GPU
    gpus: int
    cpus: int
    memory_bytes: int
    address: str  # IP that other nodes reach it under
    labels: dict[str, str] = field(default_factory=dict)
    alive: bool = True
    shared_checkpoints: bool = True  # PHALANX_CHECKPOINT_DIR is storage that all nodes see
    own_users: bool = False  # ranks of each tenant run under their own Unix user


@dataclass(frozen=True)
class Backlog:
    """What an agent keeps because the server has not acknowledged it yet, and the most that this may be."""

    facts: int
    facts_limit: int  # follows from the attempts that the agent holds and their nodes


@dataclass(frozen=True)
class Inventory:
    """`PUT /v1/agent/nodes`: the whole node list of a cluster. Sent on start, on change, and every `heartbeat_s`."""

    instance: str  # random per agent process
    sent_at: float
    nodes: list[NodeFacts]
    protocol: int = PROTOCOL_VERSION
    without_token: list[str] = field(default_factory=list)  # living nodes whose runner the agent has no token for
    backlog: Backlog | None = None


@dataclass(frozen=True)
class RankExit:
    """How one rank ended. Exactly one of `exit_code` and `signal` is set, unless its end was never seen (both null)."""

    rank: int
    exit_code: int | None = None
    signal: int | None = None
    ended_at: float | None = None
    oom: bool = False
    finished: bool = False  # the job called phalanx.finished()
    tail: str = ""  # last lines of its stderr, at most 2 KiB
    reason: str = ""  # why its node ended it, in words that follow its name; "" where it ended by itself or was stopped
    before_stop: bool = False  # it ended before its node was asked to stop it
    fault: str = ""  # `hang`, `health` (a check of its own or its node failed), `preflight`; "" for all else
    final: bool = False  # after that fault the job shall not be tried again


@dataclass(frozen=True)
class RankStart:
    rank: int
    node: str
    pid: int
    started_at: float
    warm: bool
    cold_reason: str = ""  # why it was not forked from the warm process


@dataclass(frozen=True)
class AttemptFact:
    """One fact about one attempt.

    kind: `gang_ready` (placement group exists) · `started` (every rank runs; `ranks_started`) · `ended` (every rank is
    gone on every node and the placement group is removed; `exits`) · `start_failed` (never ran and holds nothing;
    `message`; `node` where one is to blame; `permanent` where another try would end the same) · `gone` (nothing of this
    attempt is left on `node`).
    """

    attempt_id: str
    epoch: int
    kind: str
    at: float
    node: str | None = None
    message: str = ""
    first_failed_rank: int | None = None
    ranks_started: list[RankStart] = field(default_factory=list)
    exits: list[RankExit] = field(default_factory=list)
    permanent: bool = False


@dataclass(frozen=True)
class AgentReport:
    """`POST /v1/agent/reports`. Facts are in the order in which they happened and may be sent again."""

    instance: str
    sent_at: float
    facts: list[AttemptFact]


# ------------------------------------------------------------------ server -> agent


@dataclass(frozen=True)
class GroupPlacement:
    """All replicas of an attempt on one node: a group. Its ranks are `first_rank .. first_rank + ranks - 1`."""

    node: str
    replicas: int
    gpu_indices: list[int]
    group_rank: int
    first_rank: int
    ranks: int

    @property
    def all_ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.ranks)


@dataclass(frozen=True)
class Environment:
    """Packages on top of the node's own Python: the lines of a pip requirements file. `name` is for people."""

    requirements: list[str]
    name: str = ""


@dataclass(frozen=True)
class Mount:
    """A directory `source` of the node that the ranks see as `target`; both absolute paths."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Health:
    """What a node looks for while an attempt runs; the actions are `off`, `warn`, `restart` (the attempt fails) and
    `stop` (so does the job)."""

    hang: str = "off"
    hang_factor: float = 20.0  # times the median step without a step, and
    hang_at_least_s: float = 300.0
    gpu: str = "off"
    preflight_factor: float = 0.0  # so much worse than its peers a node may be before the ranks start; 0: not looked at


@dataclass(frozen=True)
class Launch:
    """What one attempt runs."""

    command: str
    env: dict[str, str]
    world_size: int
    bundle: str | None  # sha256 of the code bundle, hex
    cpus_per_group: list[float]  # by group_rank
    memory_bytes_per_group: list[int]  # by group_rank; 0 = no limit
    resume_from: str | None = None
    checkpoint_url: str | None = None  # null: the cluster's checkpoint root
    log_limit_bytes: int = 1 << 30  # per rank
    environment: Environment | None = None
    mounts: list[Mount] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # patterns of files in the working directory, to be collected
    shm_bytes: int = 0  # what /dev/shm must hold; 0: whatever the node has
    health: Health | None = None


@dataclass(frozen=True)
class ProfileRequest:
    """A trace of `steps` optimizer steps of each of these ranks, to be taken while they run."""

    profile_id: str
    steps: int
    ranks: list[int]


@dataclass(frozen=True)
class DesiredAttempt:
    """An attempt that the agent must run, or stop. What is not desired must not run: the agent ends it at once."""

    attempt_id: str
    job_id: str
    job_name: str
    tenant: str
    tenant_uid: int  # Unix uid for its ranks where the runner is root
    number: int  # 1 for the first attempt of the job
    epoch: int
    action: str  # "run" or "stop"
    grace_s: float  # between SIGTERM and SIGKILL when stopping
    groups: list[GroupPlacement]
    launch: Launch
    started: bool = False  # its ranks did run: never start it again; where nothing is left, `ended` with unseen exits
    traceparent: str | None = None
    profiles: list[ProfileRequest] = field(default_factory=list)  # that are asked for and not done


@dataclass(frozen=True)
class Desired:
    """Answer to `GET /v1/agent/desired?version=V&wait_s=S`: everything that should exist on the cluster.

    The server answers at once if its version differs from `V`, else when it changes or after `wait_s` seconds.
    """

    version: str
    attempts: list[DesiredAttempt]
    server_time: float


@dataclass(frozen=True)
class InventoryAnswer:
    """Answer to `PUT /v1/agent/nodes`. `node_tokens` has one entry for each living node that the server has given this
    agent instance no token for, or whose token the agent says it lacks; an earlier token of the node runs out some
    minutes later. A node token serves the live attempts of its node only."""

    server_time: float
    node_ids: dict[str, str]  # node name -> node id
    node_tokens: dict[str, str]  # node name -> token
    fence_s: float
    heartbeat_s: float
    outage_tolerance_s: float = 3_600.0  # a runner that reaches no server for so long ends its ranks


@dataclass(frozen=True)
class Refused:
    """A fact or report that the server did not take. reason: `stale_epoch`, `unknown_attempt`, `wrong_node`."""

    attempt_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class ReportAnswer:
    server_time: float
    refused: list[Refused] = field(default_factory=list)


# ------------------------------------------------------------------ node runner -> server


@dataclass(frozen=True)
class LogChunk:
    """Bytes `[offset, offset + len)` of one stream of one rank; `data` is base64. Sending a chunk again is harmless."""

    attempt_id: str
    epoch: int
    rank: int
    stream: str  # "stdout" or "stderr"
    offset: int
    data: str
    at: float


@dataclass(frozen=True)
class MetricPoint:
    """Values that one rank reported together. A value that is not finite is the string "nan", "inf" or "-inf"."""

    attempt_id: str
    epoch: int
    rank: int
    at: float
    step: int | None
    values: dict[str, float | str]


@dataclass(frozen=True)
class Mark:
    """Something that happened once in a rank.

    kind: `rendezvous` (process group is up) · `first_step` (first optimizer step done) · `finished`
    (phalanx.finished()) · `checkpoint` (data: url, step, and what the caller added) · `progress` (data: total_steps) ·
    `dropped` (data: what, count, bytes) · `oom` · `environment` (its environment is being built, or was; data: message)
    · `note` (data: message; a sentence for the user) · `profile` (data: id, state, and reason or bytes; state:
    `recording`, `written` or `failed`).
    """

    attempt_id: str
    epoch: int
    rank: int
    kind: str
    at: float
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttemptRef:
    attempt_id: str
    epoch: int


@dataclass(frozen=True)
class GpuStats:
    index: int
    utilization: float  # 0..1
    memory_bytes: int
    power_w: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class NodeStats:
    cpu_utilization: float  # 0..1 of the node
    memory_bytes: int  # used
    gpus: list[GpuStats] = field(default_factory=list)


@dataclass(frozen=True)
class Fill:
    """How much of something there is, and the most that there may be; 0 where it has no bound."""

    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class Fullness:
    """How near a runner is to its bounds. What was dropped is counted in items, from the runner's start."""

    outbox: Fill  # reports in memory
    reports: Fill  # on disk: the server was away
    logs: Fill  # on disk: the server's storage had no place for them
    bundles: Fill
    environments: Fill
    outputs: Fill  # files that are on their way to the server
    warm_processes: int
    warm_processes_limit: int
    dropped_logs: int
    dropped_metrics: int
    dropped_marks: int


@dataclass(frozen=True)
class Heartbeat:
    attempts: list[AttemptRef]  # with ranks on this node, or whose start is under way
    stats: NodeStats
    warm_ready: bool
    spool_bytes: int = 0
    fullness: Fullness | None = None


@dataclass(frozen=True)
class NodeReport:
    """`POST /v1/node/reports`, at most 4 MiB as JSON. The numbers of one `boot` only grow, with gaps; the server takes
    each number once and answers the highest it has (`ReportAnswer` plus `accepted_seq`)."""

    boot: str  # random per runner process
    seq: int
    sent_at: float
    heartbeat: Heartbeat | None = None
    logs: list[LogChunk] = field(default_factory=list)
    metrics: list[MetricPoint] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class NodeAnswer:
    server_time: float
    accepted_seq: int
    refused: list[Refused] = field(default_factory=list)


# ------------------------------------------------------------------ JSON


def encode(message: Any) -> dict[str, Any]:
    """The JSON form of a message: its fields by name, nested."""
    return {name: _plain(getattr(message, name)) for name in _names_of(type(message))}


def _plain(value: Any) -> Any:
    """As `dataclasses.asdict`, which copies every leaf as well, and takes three times as long."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return encode(value) if dataclasses.is_dataclass(value) else value


@functools.cache
def _names_of(kind: type) -> tuple[str, ...]:
    return tuple(spec.name for spec in dataclasses.fields(kind))


def decode(kind: type[T], data: Any, where: str = "") -> T:
    """Read a message of type `kind` from its JSON form.

    Unknown keys are ignored (a newer peer may send more); a missing field without default, or a value of another type,
    raises ValueError naming the field.
    """
    return _decode(kind, data, where or kind.__name__)


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), data, where)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(kind, data, where)
    if origin is list:
        if not isinstance(data, list):
            raise ValueError(f"{where}: expected a list, got {type(data).__name__}")
        (item,) = typing.get_args(kind)
        return [_decode(item, value, f"{where}[{index}]") for index, value in enumerate(data)]
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
        _, item = typing.get_args(kind)
        return {str(key): _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {type(data).__name__}")
    return data


def _decode_union(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _decode(option, data, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors) or f"{where}: unexpected {type(data).__name__}")


_HINTS: dict[type, dict[str, Any]] = {}


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    if kind not in _HINTS:  # evaluating annotations takes most of a decode, so once per type
        _HINTS[kind] = typing.get_type_hints(kind)
    hints = _HINTS[kind]
    values = {}
    for spec in dataclasses.fields(kind):
        if spec.name in data:
            values[spec.name] = _decode(hints[spec.name], data[spec.name], f"{where}.{spec.name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{spec.name}: missing")
    return kind(**values)
