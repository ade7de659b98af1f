"""Notes that a code bundle is stored; the bytes were written and verified by the caller before."""

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Invalid
from phalanx_server.store.audit import record_audit
from phalanx_server.store.jobs import insert_bundle
from phalanx_server.store.tenants import find_tenants


async def save_bundle(engine: AsyncEngine, tenant: str, *, digest: str, size_bytes: int, actor: Actor) -> bool:
    """Whether it is new for the tenant; if not, it counts as used again. Raises Invalid for an unknown tenant."""
    async with engine.begin() as conn:
        tenant_id = (await find_tenants(conn, [tenant])).get(tenant)
        if tenant_id is None or not actor.reaches(tenant):
            raise Invalid.field("tenant", f"there is no tenant {tenant!r:.80}")
        fresh = await insert_bundle(conn, tenant_id, digest=digest, size_bytes=size_bytes)
        if fresh:
            await record_audit(conn, actor, "save_bundle", digest, {"tenant": tenant, "bytes": size_bytes})
        return fresh
