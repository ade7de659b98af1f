"""What a token stands for, read by its id.

Owns one query, the one every request needs. Refuses to judge: hash, expiry and revocation are compared by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.schema import clusters, nodes, tenants, tokens, users


@dataclass(frozen=True, slots=True)
class Credential:
    """A row of `tokens` with the names that its scope goes by."""

    id: UUID
    kind: str
    role: str
    hash: bytes
    name: str
    user: str | None
    tenant_id: UUID | None
    tenant: str | None
    cluster_id: UUID | None
    cluster: str | None
    node_id: UUID | None
    node: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


_QUERY = (
    select(
        tokens.c.id,
        tokens.c.kind,
        tokens.c.role,
        tokens.c.hash,
        tokens.c.name,
        users.c.name.label("user"),
        tokens.c.tenant_id,
        tenants.c.path.label("tenant"),
        tokens.c.cluster_id,
        clusters.c.name.label("cluster"),
        tokens.c.node_id,
        nodes.c.name.label("node"),
        tokens.c.created_at,
        tokens.c.expires_at,
        tokens.c.revoked_at,
    )
    .select_from(tokens)
    .outerjoin(users, users.c.id == tokens.c.user_id)
    .outerjoin(tenants, tenants.c.id == tokens.c.tenant_id)
    .outerjoin(clusters, clusters.c.id == tokens.c.cluster_id)
    .outerjoin(nodes, nodes.c.id == tokens.c.node_id)
)


async def load_credential(conn: AsyncConnection, token_id: UUID) -> Credential | None:
    row = (await conn.execute(_QUERY.where(tokens.c.id == token_id))).one_or_none()
    return Credential(**row._mapping) if row else None
