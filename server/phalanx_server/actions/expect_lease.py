"""The fence around what only the leader may write: its lease must still be the newest, and stays that to the end.

Whoever writes under a lease asks first: the lease is the first lock of a transaction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.store.leases import Lease, lock_lease

# A lease that is locked cannot be renewed: who holds it waits for no other lock, and lets no statement run, longer than
# this, well below its life.
AT_MOST = "2s"


_LIMIT = text("SELECT set_config('lock_timeout', :at_most, true), set_config('statement_timeout', :at_most, true)")


class LeaseLost(Exception):
    """Another scheduler leads; nothing was written."""


async def expect_lease(conn: AsyncConnection, lease: Lease) -> None:
    """Raises LeaseLost unless `lease` is in force; no other can be until the transaction ends."""
    if not await lock_lease(conn, lease):
        raise LeaseLost(f"{lease.holder} no longer holds {lease.name} at epoch {lease.epoch}")


@asynccontextmanager
async def leading(engine: AsyncEngine, lease: Lease) -> AsyncIterator[AsyncConnection]:
    """A transaction under `lease`. Raises LeaseLost; and an error for what takes longer than AT_MOST."""
    async with engine.begin() as conn:
        await expect_lease(conn, lease)
        await conn.execute(_LIMIT, {"at_most": AT_MOST})
        yield conn
