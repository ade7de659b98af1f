"""The server's own types for the JSON of the agent link and the node link.

The other side has its types in `phalanx_worker/protocol.py`, where each message is described; `tests/contract/` passes
golden files through both. This module owns shapes only: keys that a newer peer adds are ignored, a missing key or a
value of another type is an error that names it; only what a node's runner passes on from its ranks is read part by
part, because no rank may cost the node its heartbeat. Ranges (a step, a time, a metric's name) are the business of the
actions, which refuse one value and keep the rest of the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from phalanx_server.domain.json_parts import members_of, parts_of


def without_nul(text: str) -> str:
    """PostgreSQL stores no NUL in text; what a rank prints may well hold one."""
    return text.replace("\0", "�") if "\0" in text else text


def plain(value: Any) -> Any:
    """`value` as jsonb can hold it: no NUL in strings, numbers that are not finite as strings."""
    if isinstance(value, str):
        return without_nul(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {without_nul(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


Text = Annotated[str, AfterValidator(without_nul)]
Amount = Annotated[int, Field(ge=0, lt=1 << 62)]
AnyFloat = Annotated[float, Field(allow_inf_nan=True)]
Boot = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, body: bytes | str) -> Self:
        """Raises pydantic.ValidationError naming every field that does not fit."""
        return cls.model_validate_json(body)

    def encode(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


# ------------------------------------------------------------------ agent -> server


class NodeFacts(Message):
    name: Annotated[Text, Field(min_length=1, max_length=255)]
    ray_node_id: Text
    gpu_type: Text
    gpus: Annotated[int, Field(ge=0, le=1024)]
    cpus: Annotated[int, Field(ge=0, le=1 << 20)]
    memory_bytes: Annotated[int, Field(ge=0, lt=1 << 62)]
    address: Text
    labels: dict[Text, Text] = {}
    alive: bool = True
    shared_checkpoints: bool = True
    own_users: bool = False


class Backlog(Message):
    facts: Amount
    facts_limit: Amount


class Inventory(Message):
    instance: Boot
    sent_at: float
    nodes: list[NodeFacts]
    protocol: int = 1
    without_token: list[str] = []
    backlog: Backlog | None = None


class RankExit(Message):
    rank: int
    exit_code: int | None = None
    signal: int | None = None
    ended_at: float | None = None
    oom: bool = False
    finished: bool = False
    tail: Text = ""
    reason: Text = ""
    before_stop: bool = False
    fault: Text = ""
    final: bool = False


class RankStart(Message):
    rank: int
    node: Text
    pid: int
    started_at: float
    warm: bool
    cold_reason: Text = ""


class AttemptFact(Message):
    attempt_id: str
    epoch: int
    kind: Text
    at: float
    node: Text | None = None
    message: Text = ""
    first_failed_rank: int | None = None
    ranks_started: list[RankStart] = []
    exits: list[RankExit] = []
    permanent: bool = False


class AgentReport(Message):
    instance: Boot
    sent_at: float
    facts: list[AttemptFact]


# ------------------------------------------------------------------ server -> agent


class GroupPlacement(Message):
    node: str
    replicas: int
    gpu_indices: list[int]
    group_rank: int
    first_rank: int
    ranks: int


class Environment(Message):
    requirements: list[str]
    name: str = ""


class Mount(Message):
    source: str
    target: str
    read_only: bool = True


class Health(Message):
    hang: str = "off"
    hang_factor: float = 20.0
    hang_at_least_s: float = 300.0
    gpu: str = "off"
    preflight_factor: float = 0.0


class Launch(Message):
    command: str
    env: dict[str, str]
    world_size: int
    bundle: str | None
    cpus_per_group: list[float]
    memory_bytes_per_group: list[int]
    resume_from: str | None = None
    checkpoint_url: str | None = None
    log_limit_bytes: int = 1 << 30
    environment: Environment | None = None
    mounts: list[Mount] = []
    outputs: list[str] = []
    shm_bytes: int = 0
    health: Health | None = None


class ProfileRequest(Message):
    profile_id: str
    steps: int
    ranks: list[int]


class DesiredAttempt(Message):
    attempt_id: str
    job_id: str
    job_name: str
    tenant: str
    tenant_uid: int
    number: int
    epoch: int
    action: str
    grace_s: float
    groups: list[GroupPlacement]
    launch: Launch
    started: bool = False
    traceparent: str | None = None
    profiles: list[ProfileRequest] = []


class Desired(Message):
    version: str
    attempts: list[DesiredAttempt]
    server_time: float


class InventoryAnswer(Message):
    server_time: float
    node_ids: dict[str, str]
    node_tokens: dict[str, str]
    fence_s: float
    heartbeat_s: float
    outage_tolerance_s: float = 3_600.0


class Refused(Message):
    attempt_id: str
    epoch: int
    reason: str


class ReportAnswer(Message):
    server_time: float
    refused: list[Refused] = []


# ------------------------------------------------------------------ node runner -> server


class LogChunk(Message):
    attempt_id: str
    epoch: int
    rank: int
    stream: str
    offset: int
    data: str
    at: float


class MetricPoint(Message):
    attempt_id: str
    epoch: int
    rank: int
    at: float
    step: int | None
    values: dict[Text, AnyFloat | str]


class Mark(Message):
    attempt_id: str
    epoch: int
    rank: int
    kind: Text
    at: float
    data: dict[str, Any] = {}


class AttemptRef(Message):
    attempt_id: str
    epoch: int


class GpuStats(Message):
    index: int
    utilization: float
    memory_bytes: int
    power_w: float | None = None
    temperature_c: float | None = None


class NodeStats(Message):
    cpu_utilization: float
    memory_bytes: int
    gpus: list[GpuStats] = []


class Fill(Message):
    used_bytes: Amount
    limit_bytes: Amount


class Fullness(Message):
    outbox: Fill
    reports: Fill
    logs: Fill
    bundles: Fill
    environments: Fill
    outputs: Fill
    warm_processes: Amount
    warm_processes_limit: Amount
    dropped_logs: Amount
    dropped_metrics: Amount
    dropped_marks: Amount


class Heartbeat(Message):
    attempts: list[AttemptRef]
    stats: NodeStats
    warm_ready: bool
    spool_bytes: Amount = 0
    fullness: Fullness | None = None


class NodeReport(Message):
    boot: Boot
    seq: Annotated[int, Field(ge=1, lt=1 << 62)]
    sent_at: float
    heartbeat: Heartbeat | None = None
    logs: list[LogChunk] = []
    metrics: list[MetricPoint] = []
    marks: list[Mark] = []
    _left_out: int = PrivateAttr(0)

    @property
    def left_out(self) -> int:
        """How many logs, metrics and marks could not be read."""
        return self._left_out

    @classmethod
    def read(cls, body: bytes | str) -> Self:
        """Leaves out the logs, metrics and marks that do not fit. Raises pydantic.ValidationError for the rest."""
        try:
            return super().read(body)
        except ValidationError as error:
            return cls._read_apart(body.encode() if isinstance(body, str) else body, error)

    @classmethod
    def _read_apart(cls, body: bytes, error: ValidationError) -> Self:
        kinds = {b'"logs"': LogChunk, b'"metrics"': MetricPoint, b'"marks"': Mark}
        try:
            members = members_of(body)
            parts = {key: parts_of(members.pop(key)) for key in kinds if key in members}
        except ValueError:
            raise error from None
        head = b",".join(b":".join(member) for member in members.items())
        readable = {key.decode().strip('"'): _readable(kinds[key], each) for key, each in parts.items()}
        report = super().read(b"{%b}" % head).model_copy(update=readable)
        report._left_out = sum(map(len, parts.values())) - sum(map(len, readable.values()))
        return report


G = TypeVar("G", bound=Message)


def _readable(kind: type[G], parts: Sequence[bytes]) -> list[G]:
    found: list[G] = []
    for part in parts:
        with contextlib.suppress(ValidationError):
            found.append(kind.read(part))
    return found


class NodeAnswer(Message):
    server_time: float
    accepted_seq: int
    refused: list[Refused] = []
