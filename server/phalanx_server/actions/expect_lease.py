"""The fence around what only the leader may write: its lease must still be the newest, and stays that to the end.

Whoever writes under a lease asks first: the lease is the first lock of a transaction.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.leases import Lease, lock_lease


class LeaseLost(Exception):
    """Another scheduler leads; nothing was written."""


async def expect_lease(conn: AsyncConnection, lease: Lease) -> None:
    """Raises LeaseLost unless `lease` is in force; no other can be until the transaction ends."""
    if not await lock_lease(conn, lease):
        raise LeaseLost(f"{lease.holder} no longer holds {lease.name} at epoch {lease.epoch}")
