"""The job file: what a user asks for, checked and in canonical form.

Owns every key, its limits and its defaults. `JobSpec.dump()` is what is stored: durations in seconds and sizes in bytes
under the same keys, short forms written out; it is itself a valid job file that reads back to the same spec. Keys whose
part is not built yet are refused by name, never ignored. Refuses to know whether tenants, nodes or bundles exist.
"""

import itertools
import re
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from phalanx_server.domain.environment import clean_requirements
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.field_errors import check_text, explain, join
from phalanx_server.domain.job import priority_of
from phalanx_server.domain.tenant import check_path
from phalanx_server.domain.units import parse_duration, parse_size

REPLICAS_MAX = 10_000
GPUS_PER_REPLICA_MAX = 1_024
COMMAND_MAX_BYTES = 64 << 10
ENV_MAX_BYTES = 64 << 10
LABELS_MAX = 64
MOUNTS_MAX = 16
OUTPUTS_MAX = 64
PATTERN_MAX_CHARS = 512
# Far from the last date that there is, whose arithmetic ends in errors.
NOT_BEFORE_YEAR_MAX = 9_000
DURATION_MAX_S = 10 * 365 * 86400.0
MEMORY_MAX_BYTES = 1 << 50

# What the runner sets for every rank; a job that set them would only be overruled.
_SET_BY_US = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
        "TORCHELASTIC_USE_AGENT_STORE",
        "CUDA_VISIBLE_DEVICES",
    }
)
# What a process trusts because only root writes there: nothing of a user is mounted over it.
_SYSTEM_DIRECTORIES = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "root", "run", "sbin", "sys", "tmp", "usr"}
    | {"var"}
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _not_supported(given: object) -> None:
    """Takes absence only. A later version that builds the part replaces this by a model."""
    if given not in (None, [], {}):
        raise PydanticCustomError(
            "unsupported", "is not supported by this version of Phalanx", {"hint": "leave it out"}
        )


def _number_as_text(given: object) -> object:
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


_DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "examples": ["30s", "4h"]}]}
_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["64GiB"]}]}
Duration = Annotated[
    float, BeforeValidator(parse_duration), Field(ge=0, le=DURATION_MAX_S), WithJsonSchema(_DURATION_SCHEMA)
]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=MEMORY_MAX_BYTES), WithJsonSchema(_SIZE_SCHEMA)]
Whole = Annotated[int, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, BeforeValidator(_number_as_text)]
Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Unsupported = Annotated[None, BeforeValidator(_not_supported)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_written(schema: dict[str, Any]) -> None:
    """The schema of what a user may write: the short form is a number, and nothing that is filled in is required."""
    schema["properties"]["gpus"] = {"type": "integer", "minimum": 0, "description": "So many replicas of one GPU."}
    schema["required"] = []
    schema["anyOf"] = [{"required": ["gpus"]}, {"required": ["gpus_per_replica"]}]


class Resources(_Part):
    """The gang: `replicas`, all at once or none; a replica never spans nodes."""

    model_config = ConfigDict(json_schema_extra=_as_written)

    replicas: Annotated[Whole, Field(ge=1, le=REPLICAS_MAX)] = 1
    gpus_per_replica: Annotated[Whole, Field(ge=0, le=GPUS_PER_REPLICA_MAX)]
    ranks_per_replica: Annotated[Whole, Field(ge=1, le=GPUS_PER_REPLICA_MAX)]
    gpu_types: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    cpus_per_gpu: Annotated[Whole, Field(ge=0, le=4096)] | None = None
    cpus_per_replica: Annotated[Whole, Field(ge=0, le=65536)] = 0
    memory_per_gpu: Size | None = None
    memory_per_replica: Size = 0
    gpus: None = None
    elastic: Unsupported = None
    topology: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = _write_out_gpus({key: value for key, value in given.items() if value is not None})
        gpus = given.get("gpus_per_replica")
        if not _is_count(gpus):
            return {"ranks_per_replica": 1, **given}  # what is wrong with the GPUs is said once
        given.setdefault("ranks_per_replica", gpus or 1)
        _multiply_out(given, "cpus", gpus, default=0 if gpus else 1)
        _multiply_out(given, "memory", gpus, default=0)
        return given

    @field_validator("gpu_types")
    @classmethod
    def _each_once(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(types)) < len(types):
            raise ValueError(f"names a type twice: {', '.join(types)}")
        return types


def _write_out_gpus(given: dict[str, Any]) -> dict[str, Any]:
    """`gpus: 16` is 16 replicas of one GPU; `gpus: 0` says that it is a CPU job."""
    gpus = given.pop("gpus", None)
    if gpus is None:
        if "gpus_per_replica" not in given:
            raise ValueError("say gpus_per_replica (0 for a CPU job), or gpus for so many replicas of one GPU")
        return given
    if not _is_count(gpus):
        raise ValueError(f"gpus must be a whole number of at least 0, not {gpus!r}")
    if gpus == 0:
        return {"gpus_per_replica": 0, **given}
    if "replicas" in given or "gpus_per_replica" in given:
        raise ValueError("gpus is short for replicas of one GPU: say either gpus, or replicas and gpus_per_replica")
    return {"replicas": gpus, "gpus_per_replica": 1, **given}


def _multiply_out(given: dict[str, Any], what: str, gpus: int, *, default: int) -> None:
    """Fill in `<what>_per_replica` from `<what>_per_gpu`; where both are given they must agree."""
    per_gpu, per_replica = given.get(f"{what}_per_gpu"), given.get(f"{what}_per_replica")
    if per_gpu is None:
        given.setdefault(f"{what}_per_replica", default)
        return
    parse = parse_size if what == "memory" else int
    try:
        product = parse(per_gpu) * gpus
        agrees = per_replica is None or parse(per_replica) == product
    except (ValueError, TypeError, OverflowError):
        return  # the fields themselves say what is wrong with them
    if not agrees:
        raise ValueError(f"{what}_per_gpu and {what}_per_replica contradict each other: say one of them")
    given[f"{what}_per_replica"] = product


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class JobEnvironment(_Part):
    """Packages on top of the node's own Python: `requirements`, as pip has them, or the `name` of a registered
    environment, whose requirements the server fills in."""

    name: Name | None = None
    requirements: Annotated[tuple[str, ...], Field(max_length=10_000)] = ()
    image: Unsupported = None

    @field_validator("requirements", mode="before")
    @classmethod
    def _are_lines(cls, given: object) -> object:
        if isinstance(given, str):
            raise ValueError("expected a list of lines; `phalanx submit` reads a requirements file and sends its lines")
        return given if given is not None else ()

    @field_validator("requirements")
    @classmethod
    def _are_clean(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        return clean_requirements(lines)

    @model_validator(mode="after")
    def _says_something(self) -> "JobEnvironment":
        if self.name is None and not self.requirements:
            raise ValueError("say requirements, or the name of a registered environment")
        return self


class JobMount(_Part):
    """A directory of the node, under another path for the ranks. The operator says which may be mounted."""

    source: Annotated[str, Field(min_length=1, max_length=1024)]
    target: Annotated[str, Field(min_length=1, max_length=1024)]
    read_only: Switch = True

    @field_validator("source")
    @classmethod
    def _is_host_path(cls, source: str) -> str:
        scheme, colon, _ = source.partition("://")
        if colon and scheme != "host":
            raise ValueError(
                f"{source[:80]!r}: only directories of the node can be mounted (host:///path); a volume is mounted "
                "into the workers first, see docs/kubernetes.md"
            )
        return _absolute(source.removeprefix("host://"))

    @field_validator("target")
    @classmethod
    def _is_free(cls, target: str) -> str:
        path = _absolute(target)
        if path.split("/")[1] in _SYSTEM_DIRECTORIES:
            raise ValueError(f"{target[:80]!r} lies in a directory of the system; choose one like /data")
        return path


def _absolute(path: str) -> str:
    """The path as it is written without detours. Raises ValueError unless it is absolute, and more than the root."""
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path[:80]!r} is not an absolute path without '..'")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise ValueError("is the root directory; name one below it")
    return "/" + "/".join(parts)


class Run(_Part):
    """What each rank runs. `workdir` is for the client, which uploads it and says its hash in `bundle`."""

    command: Annotated[str, Field(min_length=1)]
    workdir: str | None = None
    bundle: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    env: dict[str, Text] = Field(default_factory=dict)
    environment: JobEnvironment | None = None
    mounts: Annotated[tuple[JobMount, ...], Field(max_length=MOUNTS_MAX)] = ()
    outputs: Annotated[tuple[str, ...], Field(max_length=OUTPUTS_MAX)] = ()
    shm: Annotated[Size, Field(gt=0)] | None = None
    secrets: Unsupported = None
    recipe: Unsupported = None
    args: Unsupported = None

    @field_validator("command")
    @classmethod
    def _has_words(cls, command: str) -> str:
        size = len(command.encode())
        if not command.strip():
            raise ValueError("is blank: say what each rank runs")
        if size > COMMAND_MAX_BYTES:
            raise ValueError(f"is {size} bytes long, at most {COMMAND_MAX_BYTES}; put it into a script in the workdir")
        return command

    @field_validator("mounts")
    @classmethod
    def _apart(cls, mounts: tuple[JobMount, ...]) -> tuple[JobMount, ...]:
        targets = sorted(mount.target for mount in mounts)
        for upper, lower in itertools.combinations(targets, 2):
            if lower == upper or lower.startswith(f"{upper}/"):
                raise ValueError(f"{lower!r} would be mounted over {upper!r}")
        return mounts

    @field_validator("outputs")
    @classmethod
    def _inside_workdir(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not 0 < len(pattern) <= PATTERN_MAX_CHARS or pattern.startswith("/") or ".." in pattern.split("/"):
                raise ValueError(f"{pattern[:80]!r} is no pattern of files in the working directory, like out/**")
        return patterns

    @field_validator("env")
    @classmethod
    def _names_and_size(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is no name of an environment variable")
            if name in _SET_BY_US or name.startswith("PHALANX_"):
                raise ValueError(f"{name} is set by Phalanx for every rank")
        size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
        if size > ENV_MAX_BYTES:
            raise ValueError(f"is {size} bytes in all, at most {ENV_MAX_BYTES}")
        return env


class Retries(_Part):
    """How often a failed job is tried again. Preemption and node loss use none up."""

    max: Annotated[Whole, Field(ge=0, le=1000)] = 0
    backoff: Duration = 30.0


class Preemption(_Part):
    preemptible: Switch = True
    grace: Annotated[Duration, Field(le=3600)] = 30.0
    min_runtime: Duration = 0.0


class Checkpoint(_Part):
    """Where checkpoints go; without `url`, into the cluster's checkpoint root."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    keep_last: Unsupported = None

    @field_validator("url")
    @classmethod
    def _is_absolute(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith("/") and not re.match(r"[a-z][a-z0-9+.-]*://[^/]*", url):
            raise ValueError(f"{url[:80]!r} is neither a URL like s3://bucket/path nor an absolute path")
        return url


class JobSpec(_Part):
    """One job, frozen: what was asked."""

    name: Name
    tenant: str | None = None
    priority: str | Whole = "normal"
    resources: Resources
    run: Run
    time_limit: Annotated[Duration, Field(gt=0)] | None = None
    retries: Retries = Retries()
    preemption: Preemption = Preemption()
    checkpoint: Checkpoint = Checkpoint()
    restart: Literal["fenced", "eager"] = "fenced"
    not_before: datetime | None = None
    labels: dict[str, Text] = Field(default_factory=dict)
    held: Switch = False
    after: Unsupported = None
    array: Unsupported = None

    @field_validator("tenant")
    @classmethod
    def _is_path(cls, tenant: str | None) -> str | None:
        try:
            return tenant if tenant is None else check_path(tenant)
        except Invalid as error:
            raise ValueError(error.errors[0].message) from error

    @field_validator("priority", mode="before")
    @classmethod
    def _is_class_or_number(cls, given: object) -> object:
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise ValueError(f"expected a priority class or a whole number, got {given!r:.60}")
        priority_of(given)
        return given

    @field_validator("not_before", mode="before")
    @classmethod
    def _is_text(cls, given: object) -> object:
        if given is not None and not isinstance(given, str | datetime):
            raise ValueError("expected a time like 2026-11-21T00:00:00Z")
        return given

    @field_validator("not_before")
    @classmethod
    def _in_utc(cls, at: datetime | None) -> datetime | None:
        if at is not None and at.tzinfo is None:
            raise ValueError("has no time zone: end it with Z or an offset like +01:00")
        try:
            at = at if at is None else at.astimezone(UTC)
        except OverflowError:
            at = datetime.max
        if at is not None and at.year > NOT_BEFORE_YEAR_MAX:
            raise ValueError(f"is not within the years 1 to {NOT_BEFORE_YEAR_MAX} in UTC")
        return at

    @field_validator("labels")
    @classmethod
    def _few_and_short(cls, labels: dict[str, str]) -> dict[str, str]:
        if len(labels) > LABELS_MAX:
            raise ValueError(f"{len(labels)} labels, at most {LABELS_MAX}")
        for key, value in labels.items():
            if not 1 <= len(key) <= 128 or len(value) > 256 or "=" in key:
                raise ValueError(
                    f"{key[:80]!r}: a label has a key of 1 to 128 characters without '=', a value of up to 256"
                )
        return labels

    @cached_property
    def priority_value(self) -> int:
        """The number that the queue is ordered by."""
        return priority_of(self.priority)

    @property
    def world_size(self) -> int:
        return self.resources.replicas * self.resources.ranks_per_replica

    def for_tenant(self, tenant: str) -> "JobSpec":
        """The same, asked for by `tenant`."""
        return self if tenant == self.tenant else self.model_copy(update={"tenant": tenant})

    def with_requirements(self, requirements: tuple[str, ...]) -> "JobSpec":
        """The same, its named environment with these requirements."""
        assert self.run.environment is not None
        environment = self.run.environment.model_copy(update={"requirements": requirements})
        return self.model_copy(update={"run": self.run.model_copy(update={"environment": environment})})

    def dump(self) -> dict[str, Any]:
        """The canonical form: JSON values only."""
        return self.model_dump(mode="json")


def parse_job(document: Any, *, where: str = "") -> JobSpec:
    """Read a job file. Raises Invalid or UnknownField; `where` ("jobs[3]") is put before every field that they name."""
    if not isinstance(document, dict):
        raise Invalid.field(where, f"expected an object with name, resources and run, got {type(document).__name__}")
    check_text(document, where=where)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise explain(error, JobSpec, where=where) from None


def field_of(where: str, *path: str) -> str:
    """The name of a field of a job: `field_of("jobs[3]", "run", "bundle")`."""
    return join(where, path)
