"""The job file: what a user asks for, checked and in canonical form.

Owns every key, its limits and its defaults. `JobSpec.dump()` is what is stored: durations in seconds and sizes in bytes
under the same keys, short forms written out; it is itself a valid job file that reads back to the same spec. Keys whose
part is not built yet are refused by name, never ignored. Refuses to know whether tenants, nodes or bundles exist.
"""

import re
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal

from phalanx.recipes import catalog
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.precision import check_gpu_types
from phalanx.units import parse_size
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from phalanx_server.domain.array import Array, parse_indices
from phalanx_server.domain.dependency import After
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.field_errors import check_text, explain, join
from phalanx_server.domain.field_types import (
    Duration,
    Labels,
    Moment,
    Name,
    Part,
    Size,
    Switch,
    Unsupported,
    Whole,
)
from phalanx_server.domain.gang_spec import Elastic, Topology
from phalanx_server.domain.health_spec import Health
from phalanx_server.domain.job import priority_of
from phalanx_server.domain.run_spec import Run, wrong_arguments
from phalanx_server.domain.tenant import check_path

REPLICAS_MAX = 10_000
GPUS_PER_REPLICA_MAX = 1_024


def _as_written(schema: dict[str, Any]) -> None:
    """The schema of what a user may write: the short form is a number, and nothing that is filled in is required."""
    schema["properties"]["gpus"] = {"type": "integer", "minimum": 0, "description": "So many replicas of one GPU."}
    schema["required"] = []
    schema["anyOf"] = [{"required": ["gpus"]}, {"required": ["gpus_per_replica"]}]


class Resources(Part):
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
    elastic: Elastic | None = None
    topology: Topology | None = None

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

    @property
    def world_sizes(self) -> range:
        """How many ranks it may run with."""
        low, high = (self.elastic.min_replicas, self.elastic.max_replicas) if self.elastic else (self.replicas,) * 2
        step = self.topology.slice.replicas if self.topology and self.topology.slice else 1
        each = self.ranks_per_replica
        return range(low * each, high * each + 1, step * each)

    @field_validator("gpu_types")
    @classmethod
    def _each_once(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(types)) < len(types):
            raise ValueError(f"names a type twice: {', '.join(types)}")
        return types

    @field_validator("elastic")
    @classmethod
    def _around_replicas(cls, elastic: Elastic | None, info: ValidationInfo) -> Elastic | None:
        replicas = info.data.get("replicas")
        if elastic is None or replicas is None:
            return elastic
        if not elastic.min_replicas <= replicas <= elastic.max_replicas:
            raise ValueError(f"replicas is {replicas}: choose min_replicas and max_replicas around it")
        if elastic.max_replicas > REPLICAS_MAX:
            raise ValueError(f"max_replicas is {elastic.max_replicas}, at most {REPLICAS_MAX}")
        return elastic

    @field_validator("topology")
    @classmethod
    def _slices_divide_the_gang(cls, topology: Topology | None, info: ValidationInfo) -> Topology | None:
        if topology is None or topology.slice is None:
            return topology
        elastic, each = info.data.get("elastic"), topology.slice.replicas
        sizes = {"replicas": info.data.get("replicas")} | (elastic.model_dump() if elastic else {})
        for name, size in sizes.items():
            if size is not None and size % each:
                raise ValueError(f"slice.replicas is {each}, which does not divide {name}, {size}")
        return topology


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


class Retries(Part):
    """How often a failed job is tried again. Preemption and node loss use none up."""

    max: Annotated[Whole, Field(ge=0, le=1000)] = 0
    backoff: Duration = 30.0


class Preemption(Part):
    preemptible: Switch = True
    grace: Annotated[Duration, Field(le=3600)] = 30.0
    min_runtime: Duration = 0.0


class Checkpoint(Part):
    """Where checkpoints go; without `url`, into the cluster's checkpoint root."""

    url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    keep_last: Unsupported = None

    @field_validator("url")
    @classmethod
    def _is_absolute(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith("/") and not re.match(r"[a-z][a-z0-9+.-]*://[^/]*", url):
            raise ValueError(f"{url[:80]!r} is neither a URL like s3://bucket/path nor an absolute path")
        return url


class JobSpec(Part):
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
    health: Health | None = None
    restart: Literal["fenced", "eager"] = "fenced"
    not_before: Moment | None = None
    deadline: Moment | None = None
    labels: Labels = Field(default_factory=dict)
    held: Switch = False
    after: After | None = None
    array: Array | None = None

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

    @field_validator("run")
    @classmethod
    def _fits_the_gang(cls, run: Run, info: ValidationInfo) -> Run:
        resources = info.data.get("resources")
        if run.recipe is not None and resources is not None:
            try:
                config = catalog.check(run.recipe, run.args, resources.world_sizes)
                if resources.gpu_types or not resources.gpus_per_replica:
                    check_gpu_types(config.precision, resources.gpu_types)
            except RecipeError as error:
                raise wrong_arguments(error, within="args") from None
        return run

    @field_validator("deadline")
    @classmethod
    def _after_its_earliest_start(cls, deadline: datetime | None, info: ValidationInfo) -> datetime | None:
        not_before = info.data.get("not_before")
        if deadline is not None and not_before is not None and deadline <= not_before:
            raise ValueError(f"is not after not_before, {not_before:%Y-%m-%dT%H:%M:%SZ}")
        return deadline

    @cached_property
    def priority_value(self) -> int:
        """The number that the queue is ordered by."""
        return priority_of(self.priority)

    @cached_property
    def indices(self) -> tuple[int | None, ...]:
        """The jobs that it stands for: their indices in the array, or one job that has none."""
        return (None,) if self.array is None else parse_indices(self.array.indices)

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
