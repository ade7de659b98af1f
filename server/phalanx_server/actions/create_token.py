"""Makes an API token for a user or a cluster: shown once, stored as a hash."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.access import MACHINE_ROLES, TENANT_ROLES, Actor, Role, may_mint
from phalanx_server.domain.errors import Forbidden, Invalid
from phalanx_server.domain.field_errors import check_text
from phalanx_server.store import ids, tokens
from phalanx_server.store.audit import record_audit
from phalanx_server.store.tenants import find_tenants

NAME_MAX_CHARS = 128
LIFE_MAX_S = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """`tenant` goes with the roles manager, member and viewer, `cluster` with cluster; a `user` is made on the fly."""

    name: str
    role: str
    tenant: str | None = None
    cluster: str | None = None
    user: str | None = None
    expires_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class CreatedToken:
    """`text` is the token itself: show it once and forget it."""

    id: UUID
    text: str
    expires_at: datetime | None


async def create_token(
    conn: AsyncConnection, wanted: NewToken, *, actor: Actor, now: datetime, minted: tokens.Minted | None = None
) -> CreatedToken:
    """A new token, or `minted`. Raises Invalid (a field is wrong) and Forbidden (the caller's own role does not reach
    that far)."""
    _check(wanted)
    if not may_mint(actor, role=wanted.role, tenant=wanted.tenant):
        raise Forbidden(f"a {actor.role} may not make a token with the role {wanted.role} there")
    await _check_user(conn, wanted.user, actor)
    expires_at = None if wanted.expires_in_s is None else now + timedelta(seconds=wanted.expires_in_s)
    row = tokens.TokenRow(
        kind="cluster" if wanted.role == Role.CLUSTER else "user",
        role=wanted.role,
        name=wanted.name,
        user_id=await tokens.find_or_make_user(conn, wanted.user) if wanted.user else None,
        tenant_id=await _tenant(conn, wanted.tenant),
        cluster_id=await _cluster(conn, wanted.cluster),
        expires_at=expires_at,
    )
    minted = minted or tokens.mint()
    await tokens.insert_token(conn, minted, row)
    detail = {"name": wanted.name, "role": wanted.role, "tenant": wanted.tenant, "cluster": wanted.cluster}
    await record_audit(conn, actor, "create_token", ids.encode("token", minted.id), detail | {"user": wanted.user})
    return CreatedToken(minted.id, minted.text, expires_at)


def _check(wanted: NewToken) -> None:
    roles = sorted(set(Role) - {Role.NODE})
    if wanted.role not in roles:
        raise Invalid.field("role", f"{wanted.role!r:.80} is no role", f"one of {', '.join(roles)}")
    for field in ("name", "user"):
        value = getattr(wanted, field)
        check_text(value, where=field)
        if value is not None and not 1 <= len(value.strip()) <= NAME_MAX_CHARS:
            raise Invalid.field(field, f"has {len(value)} characters: 1 to {NAME_MAX_CHARS} are expected")
    _check_scope("tenant", wanted.tenant, needed=wanted.role in TENANT_ROLES, role=wanted.role)
    _check_scope("cluster", wanted.cluster, needed=wanted.role in MACHINE_ROLES, role=wanted.role)
    if wanted.expires_in_s is not None and not 0 < wanted.expires_in_s <= LIFE_MAX_S:
        raise Invalid.field("expires_in_s", f"{wanted.expires_in_s:g} is not in 0..{LIFE_MAX_S:g} seconds")


def _check_scope(field: str, value: str | None, *, needed: bool, role: str) -> None:
    if needed and not value:
        raise Invalid.field(field, f"a token with the role {role} needs one")
    if value and not needed:
        raise Invalid.field(field, f"a token with the role {role} has none", "leave it out")


async def _check_user(conn: AsyncConnection, user: str | None, actor: Actor) -> None:
    """Audit rows go by the user's name, so nobody makes a token in the name of a user who is known beyond their reach.
    Raises Forbidden."""
    if user is None or actor.tenant is None or user == actor.name:
        return
    if await tokens.is_user_beyond(conn, user, within=actor.tenant):
        raise Forbidden(f"user {user!r:.80} has tokens outside of {actor.tenant}: choose another name")


async def _tenant(conn: AsyncConnection, path: str | None) -> UUID | None:
    if path is None:
        return None
    found = (await find_tenants(conn, [path])).get(path)
    if found is None:
        raise Invalid.field("tenant", f"there is no tenant {path!r:.80}")
    return found


async def _cluster(conn: AsyncConnection, name: str | None) -> UUID | None:
    if name is None:
        return None
    found = await tokens.find_cluster(conn, name)
    if found is None:
        raise Invalid.field("cluster", f"there is no cluster {name!r:.80}")
    return found
