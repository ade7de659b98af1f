"""Take, renew or give up the right to act alone.

Owns the transaction around the lease. Who wants which lease, and when to ask again, is for the loop that holds it.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.store.leases import Lease, give_up_lease, take_lease


async def acquire_lease(engine: AsyncEngine, *, name: str, holder: str, ttl_s: float) -> Lease | None:
    """The lease, new or renewed for `ttl_s` by the database's clock; None while somebody else holds it."""
    async with engine.begin() as conn:
        return await take_lease(conn, name=name, holder=holder, ttl_s=ttl_s)


async def surrender_lease(engine: AsyncEngine, lease: Lease) -> None:
    """Let somebody else take it at once, as on an orderly end of the process."""
    async with engine.begin() as conn:
        await give_up_lease(conn, lease)
