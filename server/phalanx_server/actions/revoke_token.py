"""Revokes a token for good."""

from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import NotFound
from phalanx_server.store import ids, tokens
from phalanx_server.store.audit import record_audit


async def revoke_token(engine: AsyncEngine, token_id: UUID, *, actor: Actor, now: datetime) -> None:
    """Revoking twice is harmless. Raises NotFound, also for a token that the caller may not know of."""
    name = ids.encode("token", token_id)
    async with engine.begin() as conn:
        token = await tokens.get_token(conn, token_id)
        if token is None or (actor.tenant is not None and not (token.tenant and actor.reaches(token.tenant))):
            raise NotFound(f"there is no token {name}")
        if await tokens.revoke(conn, token_id, now):
            await record_audit(conn, actor, "revoke_token", name, {"name": token.name})
