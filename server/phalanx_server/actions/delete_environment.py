"""Deletes a registered environment. Jobs that used it keep their own copy of its requirements."""

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.access import Actor, in_line
from phalanx_server.domain.errors import Forbidden, NotFound
from phalanx_server.store import environments, ids
from phalanx_server.store.audit import record_audit


async def delete_environment(engine: AsyncEngine, environment_id: UUID, *, actor: Actor) -> None:
    """Raises NotFound, also for one that the caller may not know of, and Forbidden for one that is only inherited."""
    name = ids.encode("environment", environment_id)
    async with engine.begin() as conn:
        row = await environments.load_environment(conn, environment_id)
        if row is None or not in_line(actor.tenant, row.tenant):
            raise NotFound(f"there is no environment {name}")
        if not actor.reaches(row.tenant):
            raise Forbidden(f"{row.name} belongs to {row.tenant}, above {actor.tenant}: a manager there may delete it")
        if not await environments.delete_environment(conn, environment_id):
            raise NotFound(f"there is no environment {name}")
        await record_audit(conn, actor, "delete_environment", name, {"name": row.name, "tenant": row.tenant})
