"""API tokens: made, listed, revoked; and who one is."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions import create_token as creation
from phalanx_server.actions.idempotency import once
from phalanx_server.actions.revoke_token import revoke_token
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Looking, Managing, Serving, now, parse_id
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.errors import Invalid
from phalanx_server.store import ids
from phalanx_server.store.tokens import get_token, list_tokens

router = APIRouter(tags=["tokens"])


class NewToken(Given):
    """`tenant` goes with the roles manager, member and viewer, `cluster` with cluster."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    role: str
    tenant: str | None = None
    cluster: str | None = None
    user: str | None = None
    expires_in_s: Annotated[float, Field(gt=0)] | None = None


class Token(BaseModel):
    id: str
    name: str
    role: str
    tenant: str | None
    cluster: str | None
    user: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    token: str | None = Field(default=None, description="The token itself; only in the answer that created it.")


class Whoami(BaseModel):
    """What the caller's token stands for."""

    token_id: str
    name: str
    user: str | None
    role: str
    tenant: str | None
    cluster: str | None
    expires_at: datetime | None


@router.get("/v1/whoami", operation_id="whoami")
async def whoami(principal: Looking) -> Whoami:
    """Who the caller is."""
    token = principal.credential
    return Whoami(
        token_id=ids.encode("token", token.id),
        name=token.name,
        user=token.user,
        role=token.role,
        tenant=token.tenant,
        cluster=token.cluster,
        expires_at=token.expires_at,
    )


@router.get("/v1/tokens", operation_id="list_tokens")
async def list_all_tokens(
    services: Serving, principal: Managing, limit: Limit = 50, cursor: CursorText = None
) -> Page[Token]:
    """Tokens of users and clusters, newest first; a manager sees those of their own subtree."""
    after = _id_of_cursor(cursor) if cursor else None
    async with services.reads.connect() as conn:
        rows = await list_tokens(conn, within=principal.tenant, after=after, limit=limit + 1)
    page = rows[:limit]
    more = encode_cursor(page[-1].id.hex) if len(rows) > limit else None
    return Page(items=[_document(row) for row in page], next_cursor=more)


@router.post("/v1/tokens", operation_id="create_token", status_code=201, openapi_extra=takes(NewToken))
async def create_token(
    request: Request,
    response: Response,
    services: Serving,
    principal: Managing,
    given: Annotated[NewToken, Depends(body_as(NewToken))],
    idempotency_key: IdempotencyKey = None,
) -> Token:
    """Make a token. Its text is in this answer and nowhere else ever again, in a replayed one neither."""

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        wanted = creation.NewToken(**given.model_dump())
        made = await creation.create_token(conn, wanted, actor=principal.actor, now=now())
        row = await get_token(conn, made.id)
        assert row is not None
        return _document(row).model_copy(update={"token": made.text}).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation="create_token")
    done = await once(services.engine, key, work, secrets=["token"])
    mark_replayed(response, done.replayed)
    return Token.model_validate(done.response)


@router.delete("/v1/tokens/{token_id}", operation_id="revoke_token", status_code=204)
async def revoke(token_id: str, services: Serving, principal: Managing) -> None:
    """End a token. It works nowhere after a few seconds (PHALANX_TOKEN_CACHE_S), here at once."""
    id = parse_id("token", token_id)
    await revoke_token(services.engine, id, actor=principal.actor, now=now())
    services.authenticator.forget(id)


def _id_of_cursor(cursor: str) -> UUID:
    try:
        return UUID(hex=decode_cursor(cursor, (str,))[0])
    except ValueError as error:
        raise Invalid.field("cursor", "is not a cursor of this list") from error


def _document(row: Row[Any]) -> Token:
    shown = {name: row._mapping[name] for name in Token.model_fields if name not in ("id", "token")}
    return Token(**shown, id=ids.encode("token", row.id))
