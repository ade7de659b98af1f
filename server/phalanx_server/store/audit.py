"""The audit trail: who changed what, written in the transaction that changed it.

Owns the one way to write it. Knows no action: names and targets come from the actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.access import Actor
from phalanx_server.store.schema import audit


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One row. `target` is an id in API form or a name; `detail` holds no secret."""

    actor: Actor
    action: str
    target: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {
            "token_id": UUID(self.actor.token_id) if self.actor.token_id else None,
            "actor": self.actor.name,
            "action": self.action,
            "target": self.target,
            "detail": dict(self.detail),
            "request_id": self.actor.request_id,
        }


async def record_audit(
    conn: AsyncConnection, actor: Actor, action: str, target: str, detail: Mapping[str, Any] | None = None
) -> None:
    """Write one row."""
    await record_audits(conn, [AuditEntry(actor, action, target, detail or {})])


async def record_audits(conn: AsyncConnection, entries: Sequence[AuditEntry]) -> None:
    """Write several in one statement."""
    if entries:
        await conn.execute(insert(audit), [entry.row() for entry in entries])
