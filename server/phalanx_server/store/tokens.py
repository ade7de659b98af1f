"""Tokens, users and clusters in the database.

Owns the form of a token (`phx_<id>_<secret>`; only the secret's SHA-256 is stored) and the queries to make, list and
revoke. How a request's token is verified is `api/auth.py`'s, by `store/credentials.py`.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import clusters, nodes, tenants, tokens, users

SECRET_BYTES = 32  # 43 characters of URL-safe base64
_GIVEN = re.compile(r"phx_([0-9a-f]{32})_([A-Za-z0-9_-]{43,128})")


@dataclass(frozen=True, slots=True)
class Minted:
    """A new token: `text` is shown once, `hash` is stored."""

    id: UUID
    text: str
    hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """What a token stands for, without the token."""

    kind: str
    role: str
    name: str
    user_id: UUID | None = None
    tenant_id: UUID | None = None
    cluster_id: UUID | None = None
    node_id: UUID | None = None
    expires_at: datetime | None = None


def mint() -> Minted:
    """A token that nobody can guess."""
    token_id, secret = new_id(), secrets.token_urlsafe(SECRET_BYTES)
    return Minted(token_id, f"phx_{token_id.hex}_{secret}", hashlib.sha256(secret.encode()).digest())


def given(text: str) -> Minted:
    """A token that somebody else made, as strong as ours: for a first start whose tokens exist before the database.

    Raises ValueError, without the token in it.
    """
    parts = _GIVEN.fullmatch(text)
    if parts is None:
        raise ValueError("no token: expected phx_, 32 hex digits, _, and a secret of at least 43 URL-safe characters")
    return Minted(UUID(hex=parts[1]), text, hashlib.sha256(parts[2].encode()).digest())


async def insert_token(conn: AsyncConnection, minted: Minted, row: TokenRow) -> None:
    values = {name: getattr(row, name) for name in TokenRow.__slots__}
    await conn.execute(insert(tokens).values(id=minted.id, hash=minted.hash, **values))


async def get_token(conn: AsyncConnection, token_id: UUID) -> Row[Any] | None:
    """A token's row with the names of its scope: `user`, `tenant`, `cluster`, `node`."""
    return (await conn.execute(_select().where(tokens.c.id == token_id))).one_or_none()


async def list_tokens(
    conn: AsyncConnection, *, within: str | None, after: UUID | None, limit: int
) -> Sequence[Row[Any]]:
    """Users' and clusters' tokens, newest first, older than `after`; `within`: those of a tenant's subtree only.

    Node tokens are left out: agents make them by the hundred.
    """
    statement = _select().where(tokens.c.kind != "node").order_by(tokens.c.id.desc()).limit(limit)
    if within is not None:
        statement = statement.where(_in_subtree(within))
    if after is not None:
        statement = statement.where(tokens.c.id < after)
    return (await conn.execute(statement)).all()


async def revoke(conn: AsyncConnection, token_id: UUID, at: datetime) -> bool:
    """Whether there was one that was not revoked before."""
    statement = update(tokens).where(tokens.c.id == token_id, tokens.c.revoked_at.is_(None)).values(revoked_at=at)
    return (await conn.execute(statement)).rowcount > 0


async def find_or_make_user(conn: AsyncConnection, name: str) -> UUID:
    """The user of this name, made on the fly."""
    made = upsert(users).values(id=new_id(), name=name).on_conflict_do_nothing(index_elements=[users.c.name])
    await conn.execute(made)
    return (await conn.execute(select(users.c.id).where(users.c.name == name))).scalar_one()


async def is_user_beyond(conn: AsyncConnection, name: str, *, within: str) -> bool:
    """Whether the user of this name has a token, of any age, that is not of the subtree of tenant `within`."""
    beyond = _select().where(users.c.name == name, tenants.c.path.is_(None) | ~_in_subtree(within))
    return (await conn.execute(select(beyond.exists()))).scalar_one()


async def find_cluster(conn: AsyncConnection, name: str) -> UUID | None:
    return (await conn.execute(select(clusters.c.id).where(clusters.c.name == name))).scalar_one_or_none()


async def insert_cluster(conn: AsyncConnection, name: str) -> UUID | None:
    """A new cluster's id; None if the name is taken."""
    statement = upsert(clusters).values(id=new_id(), name=name).on_conflict_do_nothing(index_elements=[clusters.c.name])
    return (await conn.execute(statement.returning(clusters.c.id))).scalar_one_or_none()


async def list_clusters(conn: AsyncConnection) -> Sequence[Row[Any]]:
    """Every cluster, by name."""
    return (await conn.execute(select(clusters).order_by(clusters.c.name))).all()


def _in_subtree(tenant: str) -> ColumnElement[bool]:
    return (tenants.c.path == tenant) | tenants.c.path.startswith(tenant + "/", autoescape=True)


def _select() -> Select[Any]:
    columns = [column for column in tokens.c if column.name != "hash"]
    named = {"user": users.c.name, "tenant": tenants.c.path, "cluster": clusters.c.name, "node": nodes.c.name}
    return (
        select(*columns, *(column.label(name) for name, column in named.items()))
        .select_from(tokens)
        .outerjoin(users, users.c.id == tokens.c.user_id)
        .outerjoin(tenants, tenants.c.id == tokens.c.tenant_id)
        .outerjoin(clusters, clusters.c.id == tokens.c.cluster_id)
        .outerjoin(nodes, nodes.c.id == tokens.c.node_id)
    )
