"""Whether jobs can be accepted as things are: their tenant exists, their code is uploaded, the environment that they
name is registered, what they wait for exists and may still succeed, some node could hold them.

Owns the checks that need the database; what a job file may say by itself is `domain.spec`'s. Quotas and free places are
not looked at: a job that has to wait is accepted, and told why it waits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.awaited_jobs import Unmet, after_errors, awaited_by, unmet_of
from phalanx_server.actions.hardware import Hardware, HardwareWatch
from phalanx_server.actions.named_environments import Registered, environment_errors, filled_in, load_registered
from phalanx_server.actions.submit_warnings import Warnings, memory_warnings, warnings_of
from phalanx_server.domain.access import Actor
from phalanx_server.domain.array import ARRAY_MAX_JOBS
from phalanx_server.domain.errors import FieldError, Impossible, Invalid, PhalanxError
from phalanx_server.domain.gang_spec import LEVEL_NODE
from phalanx_server.domain.spec import JobSpec, Resources, field_of
from phalanx_server.domain.tenant import ROOT, nearest
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.dependencies import Target, load_targets
from phalanx_server.store.jobs import missing_bundles
from phalanx_server.store.policies import load_policy
from phalanx_server.store.tenants import all_paths, find_tenants


@dataclass(frozen=True, slots=True)
class Request:
    """Jobs that are asked for together: all or none. In a batch, errors name `jobs[3]`."""

    specs: Sequence[JobSpec]
    actor: Actor
    batch: bool = False

    def where(self, index: int) -> str:
        return f"jobs[{index}]" if self.batch else ""

    def tenant_of(self, spec: JobSpec) -> str:
        """The tenant that a job is for: the one it names, else the caller's own, else the root."""
        return spec.tenant or self.actor.tenant or ROOT


@dataclass(frozen=True, slots=True)
class Checked:
    """Jobs that can be accepted: as they are stored, but for the tenant; what may not be as it was meant, for each; and
    the ids of tenants by path."""

    specs: Sequence[JobSpec]
    warnings: Sequence[Warnings]
    tenants: Mapping[str, UUID]
    unmet: Sequence[Unmet]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks look at."""

    tenants: Mapping[str, UUID]
    all_tenants: Sequence[str]  # only where one was not found: for the hint
    missing: frozenset[tuple[UUID, str]]
    registered: Registered
    hardware: Hardware
    awaited: Mapping[UUID, Target]
    levels: Sequence[str]  # of the policy, outermost first, and the node; only where a job names one


async def check_jobs(
    conn: AsyncConnection,
    requests: Sequence[Request],
    hardware: HardwareWatch,
    *,
    policy: Policy,
    lock: bool = False,
) -> list[Checked | PhalanxError]:
    """For each request its jobs with what the server fills in, or why it is refused. `policy` is that of the settings
    file. Locked, what the jobs wait for does not end, and the policy does not change, before the transaction ends."""
    specs = [spec for request in requests for spec in request.specs]
    memory = iter(await memory_warnings(specs))  # first: nothing is locked yet
    facts = await _load(conn, requests, hardware, policy, lock)
    of_each = [list(islice(memory, len(request.specs))) for request in requests]
    return [
        _refusal(request, facts) or _accepted(request, facts, said)
        for request, said in zip(requests, of_each, strict=True)
    ]


async def _load(
    conn: AsyncConnection, requests: Sequence[Request], hardware: HardwareWatch, policy: Policy, lock: bool
) -> Facts:
    specs = [spec for request in requests for spec in request.specs]
    paths = {request.tenant_of(spec) for request in requests for spec in request.specs}
    tenants = await find_tenants(conn, sorted(paths))
    wanted = {
        (tenants[request.tenant_of(spec)], spec.run.bundle)
        for request in requests
        for spec in request.specs
        if spec.run.bundle and request.tenant_of(spec) in tenants
    }
    return Facts(
        tenants,
        await all_paths(conn) if len(tenants) < len(paths) else (),
        frozenset(await missing_bundles(conn, wanted)),
        await load_registered(
            conn, [(request.tenant_of(spec), spec) for request in requests for spec in request.specs]
        ),
        await _hardware(conn, requests, hardware),
        await load_targets(conn, {id_ for spec in specs for *_, id_ in awaited_by(spec)}, lock=lock),
        await _levels(conn, policy, lock) if any(spec.resources.topology for spec in specs) else (),
    )


async def _levels(conn: AsyncConnection, policy: Policy, lock: bool) -> Sequence[str]:
    stored = await load_policy(conn, lock="SHARE" if lock else "")
    return (*stored.over(policy).topology_levels, LEVEL_NODE)


async def _hardware(conn: AsyncConnection, requests: Sequence[Request], watch: HardwareWatch) -> Hardware:
    """Refusals and warnings rest on a fresh look only."""
    recent = watch.recent()
    specs = (spec for request in requests for spec in request.specs)
    if recent is None or any(_too_large(spec.resources, recent) or warnings_of(spec, recent).all for spec in specs):
        return await watch.look(conn)
    return recent


def _accepted(request: Request, facts: Facts, memory: Sequence[Sequence[str]]) -> Checked:
    return Checked(
        [filled_in(spec, request.tenant_of(spec), facts.registered) for spec in request.specs],
        [
            replace(warnings_of(spec, facts.hardware), memory=said)
            for spec, said in zip(request.specs, memory, strict=True)
        ],
        facts.tenants,
        [unmet_of(spec, facts.awaited) for spec in request.specs],
    )


def _refusal(request: Request, facts: Facts) -> PhalanxError | None:
    invalid: list[FieldError] = _too_many(request)
    impossible: list[FieldError] = []
    for index, spec in enumerate(request.specs):
        where = request.where(index)
        invalid += _tenant_errors(request, spec, where, facts) or _errors_within_tenant(request, spec, where, facts)
        invalid += after_errors(spec, request.actor, facts.awaited, where=where)
        invalid += _level_errors(spec, where, facts.levels)
        impossible += _named(_too_large(spec.resources, facts.hardware), where)
        impossible += _too_much_shm(spec, facts.hardware, where)
        invalid += _named(_unknown_types(spec.resources, facts.hardware), where)
    if invalid:
        return Invalid.fields(invalid + impossible)
    return Impossible.fields(impossible) if impossible else None


def _too_many(request: Request) -> list[FieldError]:
    """Arrays count with all of their jobs."""
    jobs = sum(len(spec.indices) for spec in request.specs)
    if jobs <= ARRAY_MAX_JOBS:
        return []
    return [FieldError("jobs", f"are {jobs} jobs with those of arrays, at most {ARRAY_MAX_JOBS} at once")]


def _level_errors(spec: JobSpec, where: str, levels: Sequence[str]) -> list[FieldError]:
    """Levels that the policy does not have, and slices that are no part of the domain that the gang stays in."""
    topology = spec.resources.topology
    if topology is None:
        return []
    errors = []
    for path, level in topology.levels():
        if level not in levels:
            close = nearest(level, levels)
            hint = (f"did you mean {close}? " if close else "") + f"the levels are {', '.join(levels)}"
            errors.append(FieldError(field_of(where, *_TOPOLOGY, *path), f"there is no level {level!r}", hint))
    if not errors and topology.slice is not None:
        outer = topology.required or topology.preferred or ""
        if levels.index(topology.slice.level) < levels.index(outer):
            message = f"{topology.slice.level} is a larger domain than {outer}, in which the whole gang stays"
            hint = f"the levels are {', '.join(levels)}, outermost first"
            errors.append(FieldError(field_of(where, *_TOPOLOGY, "slice", "level"), message, hint))
    return errors


_TOPOLOGY = ("resources", "topology")


def _tenant_errors(request: Request, spec: JobSpec, where: str, facts: Facts) -> list[FieldError]:
    path = request.tenant_of(spec)
    if path not in facts.tenants or not request.actor.reaches(path):
        close = nearest(path, [known for known in facts.all_tenants if request.actor.reaches(known)])
        hint = f"did you mean {close}?" if close else None
        return [FieldError(field_of(where, "tenant"), f"there is no tenant {path!r}", hint)]
    return []


def _errors_within_tenant(request: Request, spec: JobSpec, where: str, facts: Facts) -> list[FieldError]:
    """What is wrong with things that the job names and its tenant should have."""
    path, bundle = request.tenant_of(spec), spec.run.bundle
    errors = environment_errors(spec, path, facts.registered, where=where)
    if bundle and (facts.tenants[path], bundle) in facts.missing:
        message = f"{bundle[:12]}… is not uploaded for tenant {path!r}"
        errors.append(
            FieldError(field_of(where, "run", "bundle"), message, f"PUT /v1/bundles/{{sha256}}?tenant={path} first")
        )
    return errors


def _named(error: tuple[str, str, str | None] | None, where: str) -> list[FieldError]:
    return [FieldError(field_of(where, "resources", error[0]), error[1], error[2])] if error else []


def _too_much_shm(spec: JobSpec, hardware: Hardware, where: str) -> list[FieldError]:
    """Shared memory is memory: of the job, where it has a limit, and of the node."""
    asked, limit = spec.run.shm or 0, spec.resources.memory_per_replica * spec.resources.replicas
    most = max((each.memory_bytes for each in hardware.largest.values()), default=asked)
    if asked > most:
        message = f"{_in_gib(asked)} on one node, but the largest node has {_in_gib(most)} of memory"
    elif limit and asked > limit:
        message = f"{_in_gib(asked)} is more than the {_in_gib(limit)} of memory that the job asks for"
    else:
        return []
    return [FieldError(field_of(where, "run", "shm"), message, "what is in /dev/shm counts as memory of the job")]


def _in_gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):,.1f} GiB"


def _unknown_types(asked: Resources, hardware: Hardware) -> tuple[str, str, str | None] | None:
    """A gang needs one type that it accepts; types that other clusters have may be named too."""
    known = sorted(filter(None, hardware.largest))
    if not hardware.kinds or not asked.gpu_types or any(each in hardware.largest for each in asked.gpu_types):
        return None
    return "gpu_types", f"no node has {' or '.join(asked.gpu_types)}", f"known: {', '.join(known) or 'none'}"


def _too_large(asked: Resources, hardware: Hardware) -> tuple[str, str, str | None] | None:
    """Why no node of an acceptable type could hold one replica, each resource by itself."""
    accepted = {name: most for name, most in hardware.largest.items() if not asked.gpu_types or name in asked.gpu_types}
    wanted = (
        ("gpus_per_replica", asked.gpus_per_replica, "gpus", "GPUs"),
        ("cpus_per_replica", asked.cpus_per_replica, "cpus", "CPUs"),
        ("memory_per_replica", asked.memory_per_replica, "memory_bytes", "of memory"),
    )
    for field, amount, attribute, unit in wanted:
        most = max((getattr(each, attribute) for each in accepted.values()), default=amount)
        if amount > most:
            given, there = (
                f"{_in_gib(n)} {unit}" if attribute == "memory_bytes" else f"{n} {unit}" for n in (amount, most)
            )
            return field, f"{given} on one node, but the largest node has {there}", "a replica never spans nodes"
    return None
