"""Registers a Ray cluster and makes the token that its agent signs in with."""

import re
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.create_token import NewToken, create_token
from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, Invalid
from phalanx_server.store.audit import record_audit
from phalanx_server.store.tokens import Minted, insert_cluster

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class CreatedCluster:
    """`token` is shown once."""

    id: UUID
    name: str
    token: str


async def create_cluster(
    conn: AsyncConnection, name: str, *, actor: Actor, now: datetime, minted: Minted | None = None
) -> CreatedCluster:
    """Its token is a new one, or `minted`. Raises Invalid (the name) and Conflict (it exists)."""
    if not _NAME.fullmatch(name):
        raise Invalid.field("name", f"{name[:80]!r} is no cluster name", "lower-case letters, digits, '.', '_' and '-'")
    cluster_id = await insert_cluster(conn, name)
    if cluster_id is None:
        raise Conflict(f"cluster {name} exists already")
    await record_audit(conn, actor, "create_cluster", name)
    wanted = NewToken(name=f"agent of {name}", role="cluster", cluster=name)
    token = await create_token(conn, wanted, actor=actor, now=now, minted=minted)
    return CreatedCluster(cluster_id, name, token.text)
