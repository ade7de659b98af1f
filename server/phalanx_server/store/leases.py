"""Leases: who may act alone, by the clock of the database.

Owns the row and its fencing epoch, which grows whenever the lease changes hands or had run out. Whoever writes under a
lease locks it first (`lock_lease`), so that a change of hands and a write never overlap. Knows no loop and no timer.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class Lease:
    """Proof of having held `name` at `epoch`; only `lock_lease` says whether that is still so."""

    name: str
    holder: str
    epoch: int


_TAKE = text(
    """
    INSERT INTO leases AS old (name, holder, epoch, expires_at)
    VALUES (:name, :holder, 1, clock_timestamp() + make_interval(secs => :ttl_s))
    ON CONFLICT (name) DO UPDATE SET
        holder = EXCLUDED.holder,
        epoch = old.epoch + (old.holder <> EXCLUDED.holder OR old.expires_at <= clock_timestamp())::int,
        expires_at = EXCLUDED.expires_at
    WHERE old.holder = EXCLUDED.holder OR old.expires_at <= clock_timestamp()
    RETURNING epoch
    """
)
_LOCK = text("SELECT epoch FROM leases WHERE name = :name AND holder = :holder FOR NO KEY UPDATE")
_GIVE_UP = text(
    "UPDATE leases SET expires_at = clock_timestamp() WHERE name = :name AND holder = :holder AND epoch = :epoch"
)


async def take_lease(conn: AsyncConnection, *, name: str, holder: str, ttl_s: float) -> Lease | None:
    """Take or renew the lease; None while somebody else holds it. A lease that had run out comes with a new epoch."""
    epoch = (await conn.execute(_TAKE, {"name": name, "holder": holder, "ttl_s": ttl_s})).scalar_one_or_none()
    return None if epoch is None else Lease(name, holder, epoch)


async def lock_lease(conn: AsyncConnection, lease: Lease) -> bool:
    """Whether `lease` is still the newest; if so, it stays that until the transaction ends."""
    epoch = (await conn.execute(_LOCK, {"name": lease.name, "holder": lease.holder})).scalar_one_or_none()
    return epoch == lease.epoch


async def give_up_lease(conn: AsyncConnection, lease: Lease) -> None:
    """Let the lease run out now; nothing happens if it is no longer held."""
    await conn.execute(_GIVE_UP, {"name": lease.name, "holder": lease.holder, "epoch": lease.epoch})


# An agent that was replaced must not take over again. Its tombstone is a lease that nobody else can ever want.
_BURY = text(
    """
    INSERT INTO leases (name, holder, epoch, expires_at)
    VALUES (:name, :successor, 1, clock_timestamp() + interval '1 day')
    ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder, expires_at = EXCLUDED.expires_at
    """
)


async def bury_agent(conn: AsyncConnection, *, cluster: str, instance: str, successor: str) -> None:
    """Remember that an agent instance of a cluster was replaced."""
    await conn.execute(_BURY, {"name": _tombstone(cluster, instance), "successor": successor})


async def is_agent_buried(conn: AsyncConnection, *, cluster: str, instance: str) -> bool:
    """Whether this agent instance was replaced by another."""
    query = text("SELECT EXISTS (SELECT FROM leases WHERE name = :name)")
    return (await conn.execute(query, {"name": _tombstone(cluster, instance)})).scalar_one()


def _tombstone(cluster: str, instance: str) -> str:
    return f"replaced-agent/{cluster}/{instance}"
