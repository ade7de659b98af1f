"""Registers an environment: requirements under a name, which jobs of the tenant and of all below it may use.

It is never changed afterwards: other packages need another name, so that a job means the same at every submit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.access import Actor
from phalanx_server.domain.environment import clean_requirements
from phalanx_server.domain.errors import Conflict, Invalid
from phalanx_server.domain.tenant import ROOT, nearest
from phalanx_server.store import ids
from phalanx_server.store.audit import record_audit
from phalanx_server.store.environments import EnvironmentRow, insert_environment
from phalanx_server.store.tenants import all_paths, find_tenants


@dataclass(frozen=True, slots=True)
class NewEnvironment:
    """`tenant` None = the caller's own, else the root."""

    name: str
    requirements: Sequence[str]
    tenant: str | None = None


async def create_environment(conn: AsyncConnection, wanted: NewEnvironment, *, actor: Actor) -> UUID:
    """The new environment's id. Raises Invalid (requirements, unknown tenant) and Conflict (the name is taken)."""
    path = wanted.tenant or actor.tenant or ROOT
    requirements = _requirements(wanted.requirements)
    row = EnvironmentRow(
        id=ids.new_id(),
        tenant_id=await _tenant_id(conn, path, actor),
        name=wanted.name,
        requirements=requirements,
        created_by=actor.name,
    )
    if not await insert_environment(conn, row):
        raise Conflict(
            f"tenant {path} has an environment {wanted.name} already, and environments never change: take another"
            " name, or delete that one first"
        )
    detail = {"name": wanted.name, "tenant": path, "requirements": len(requirements)}
    await record_audit(conn, actor, "create_environment", ids.encode("environment", row.id), detail)
    return row.id


def _requirements(lines: Sequence[str]) -> tuple[str, ...]:
    try:
        requirements = clean_requirements(lines)
    except ValueError as error:
        raise Invalid.field("requirements", str(error)) from error
    if not requirements:
        raise Invalid.field("requirements", "name no package", "give lines as a requirements file has them")
    return requirements


async def _tenant_id(conn: AsyncConnection, path: str, actor: Actor) -> UUID:
    found = await find_tenants(conn, [path])
    if path in found and actor.reaches(path):
        return found[path]
    close = nearest(path, [known for known in await all_paths(conn) if actor.reaches(known)])
    raise Invalid.field("tenant", f"there is no tenant {path!r:.80}", f"did you mean {close}?" if close else None)
