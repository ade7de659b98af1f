"""What jobs that name a registered environment get: its requirements, copied into the job.

Owns how a name is resolved (the nearest registered one, going up from the job's tenant), and what is said where that
fails. The copy is what the job means from then on, whatever becomes of the name. Jobs that name none cost no query.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.errors import FieldError
from phalanx_server.domain.spec import JobSpec, field_of
from phalanx_server.domain.tenant import nearest
from phalanx_server.store.environments import environment_names, nearest_environments


@dataclass(frozen=True, slots=True)
class Registered:
    """Requirements by tenant and name; and, only where a name was not found, the names that a tenant can use."""

    requirements: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    names: Mapping[str, Collection[str]] = field(default_factory=dict)


async def load_registered(conn: AsyncConnection, jobs: Sequence[tuple[str, JobSpec]]) -> Registered:
    """What the jobs, each with its tenant, name."""
    wanted = {(tenant, name) for tenant, spec in jobs if (name := _name_in(spec)) is not None}
    if not wanted:
        return Registered()
    found = await nearest_environments(conn, wanted)
    missing = wanted - found.keys()
    names = await environment_names(conn, {tenant for tenant, _ in missing}) if missing else {}
    return Registered(found, names)


def filled_in(spec: JobSpec, tenant: str, registered: Registered) -> JobSpec:
    """The job with the requirements that its environment's name stands for."""
    name = _name_in(spec)
    return spec if name is None else spec.with_requirements(registered.requirements[tenant, name])


def environment_errors(spec: JobSpec, tenant: str, registered: Registered, *, where: str) -> list[FieldError]:
    """Why the environment that a job of `tenant` names cannot be used; nothing where it can, or where it names none."""
    environment, name = spec.run.environment, _name_in(spec)
    if environment is None or name is None:
        return []
    found = registered.requirements.get((tenant, name))
    if found is None:
        message = f"tenant {tenant!r} has no environment {name!r}, nor has one above it"
        return [FieldError(field_of(where, "run", "environment", "name"), message, _hint(tenant, name, registered))]
    if environment.requirements not in ((), found):
        message = f"contradict the environment {name!r} as it is registered"
        hint = "give the name without requirements, or requirements without a name"
        return [FieldError(field_of(where, "run", "environment", "requirements"), message, hint)]
    return []


def _hint(tenant: str, name: str, registered: Registered) -> str:
    close = nearest(name, sorted(registered.names.get(tenant, ())))
    meant = f"did you mean {close}? If not, " if close else ""
    return f"{meant}register it with: phalanx environment create {name} --requirements FILE --tenant {tenant}"


def _name_in(spec: JobSpec) -> str | None:
    return spec.run.environment.name if spec.run.environment else None
