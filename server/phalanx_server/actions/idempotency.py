"""Does a create once: the same request again, under the same key, is answered what the first one was answered.

Owns the rule: same key and same body, same answer; same key and another body, conflict. The key is taken in the
transaction of the work, so it is kept if and only if the work was done.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.domain.errors import IdempotencyConflict
from phalanx_server.store.idempotency import Kept, KeyRow, lock_key, read_keys, take_keys


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's key. `scope` = whose key for which operation; `body_hash` = SHA-256 of the request's body."""

    scope: str
    key: str
    body_hash: bytes


@dataclass(frozen=True, slots=True)
class Once:
    response: Any
    replayed: bool


async def once(
    engine: AsyncEngine,
    idempotency: Idempotency | None,
    work: Callable[[AsyncConnection], Awaitable[dict[str, Any]]],
    *,
    secrets: Sequence[str] = (),
) -> Once:
    """Do `work` in one transaction, unless it was done under this key before; its response is a JSON object.

    The fields named in `secrets` are not kept: a replay has them as null, because they are shown only once.
    """
    async with engine.begin() as conn:
        if idempotency is None:
            return Once(await work(conn), replayed=False)
        await lock_key(conn, idempotency.scope, idempotency.key)
        name = (idempotency.scope, idempotency.key)
        kept = (await read_keys(conn, [name])).get(name)
        if kept is not None:
            return Once(judge(idempotency, kept), replayed=True)
        response = await work(conn)
        shown = {field: None if field in secrets else value for field, value in response.items()}
        await take_keys(conn, [KeyRow(idempotency.scope, idempotency.key, idempotency.body_hash, shown)])
        return Once(response, replayed=False)


def judge(idempotency: Idempotency, kept: Kept) -> Any:
    """The kept response, if it was given to the same request. Raises IdempotencyConflict."""
    if kept.body_hash != idempotency.body_hash:
        raise IdempotencyConflict(
            f"the idempotency key {idempotency.key[:80]!r} was used with another body: use a new key for a new request"
        )
    return kept.response
