"""Idempotency keys: what a request was answered, so that the same request again is answered the same.

Owns the table. A key is taken in the transaction that does the work: it is there if and only if the work was done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import idempotency_keys

STATUS_CREATED = 201


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One key. `scope` says whose key it is and for which operation; `body_hash` is of the request's body."""

    scope: str
    key: str
    body_hash: bytes
    response: Any


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored under a key."""

    body_hash: bytes
    response: Any


async def take_keys(conn: AsyncConnection, rows: Sequence[KeyRow]) -> dict[tuple[str, str], Kept]:
    """Store these keys; returns what was stored before under those that were taken, by (scope, key).

    A key that another transaction is just taking is waited for. Keys are taken in order, so two never wait for each
    other.
    """
    if not rows:
        return {}
    ordered = sorted(rows, key=lambda row: (row.scope, row.key))
    values = {
        "scope": [row.scope for row in ordered],
        "key": [row.key for row in ordered],
        "body_hash": [row.body_hash for row in ordered],
        "response": [dump_json(row.response) for row in ordered],
        "status": STATUS_CREATED,
    }
    fresh = {(row.scope, row.key) for row in await conn.execute(_TAKE, values)}
    return await read_keys(conn, [(row.scope, row.key) for row in ordered if (row.scope, row.key) not in fresh])


_TAKE = text(
    """
    INSERT INTO idempotency_keys (scope, key, body_hash, status, response)
    SELECT scope, key, body_hash, :status, CAST(response AS jsonb)
    FROM unnest(CAST(:scope AS text[]), CAST(:key AS text[]), CAST(:body_hash AS bytea[]), CAST(:response AS text[]))
         AS row (scope, key, body_hash, response)
    ON CONFLICT DO NOTHING RETURNING scope, key
    """
)


async def read_keys(conn: AsyncConnection, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Kept]:
    """What is stored under these keys, by (scope, key)."""
    if not wanted:
        return {}
    table = idempotency_keys
    statement = select(table).where(tuple_(table.c.scope, table.c.key).in_(wanted))
    return {(row.scope, row.key): Kept(row.body_hash, row.response) for row in await conn.execute(statement)}


async def lock_key(conn: AsyncConnection, scope: str, key: str) -> None:
    """Make others who lock the same key wait until the end of the transaction."""
    statement = text("SELECT pg_advisory_xact_lock(hashtext('idempotency'), hashtext(:name))")
    await conn.execute(statement, {"name": f"{scope} {key}"})
