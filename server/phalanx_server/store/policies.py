"""The policy of the scheduler: what a settings file says, with what was set through the API over it.

Owns the one row of `policy` and how the two are put together. Which values a field may have is the snapshot's to say.
What a newer version stored and this one cannot read, after a step back, is passed over: no pass fails for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.documents import read_record, write_record
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.engine import dump_json

log = structlog.get_logger()
_passed_over: set[str] = set()


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """What was set, and how often."""

    settings: Mapping[str, Any]
    version: int

    def over(self, base: Policy) -> Policy:
        """What is in force: of what is stored, all that this version can read."""
        return over(base, {name: value for name, value in self.settings.items() if _is_readable(name, value)})


def _is_readable(name: str, value: Any) -> bool:
    try:
        read_record(Policy, {name: value})
    except ValueError as error:
        if name not in _passed_over:
            _passed_over.add(name)
            log.warning("a stored field of the policy is passed over", field=name, why=str(error))
        return False
    return True


def over(base: Policy, settings: Mapping[str, Any]) -> Policy:
    """`base` with these fields instead of its own. ValueError names what does not fit."""
    if not settings:
        return base
    given = read_record(Policy, dict(settings))
    return replace(base, **{name: getattr(given, name) for name in settings})


def document_of(policy: Policy) -> dict[str, Any]:
    """Every field of a policy as JSON, those with their defaults too."""
    return {name: _plain(getattr(policy, name)) for name in Policy.__slots__} | write_record(policy)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_JOB_WITH_LEVEL = text(
    """
    SELECT j.id, j.name, named.level
    FROM jobs j CROSS JOIN LATERAL unnest(ARRAY[
        j.spec #>> '{resources,topology,required}', j.spec #>> '{resources,topology,preferred}',
        j.spec #>> '{resources,topology,slice,level}']) AS named (level)
    WHERE j.state IN ('queued', 'starting', 'running', 'stopping') AND named.level = ANY(:levels) LIMIT 1
    """
)
_READ = "SELECT settings, version FROM policy WHERE id = 1"
_WRITE = text("UPDATE policy SET settings = CAST(:settings AS jsonb), version = version + 1 WHERE id = 1")


async def load_policy(conn: AsyncConnection, *, lock: str = "") -> StoredPolicy:
    """What was set. `lock`: "SHARE", so that it stays until the end of the transaction, or "UPDATE", to change it."""
    row = (await conn.execute(text(f"{_READ} FOR {lock}" if lock else _READ))).one_or_none()
    return StoredPolicy(row.settings, row.version) if row else StoredPolicy({}, 0)


async def job_with_level(conn: AsyncConnection, levels: Sequence[str]) -> Row[Any] | None:
    """A job that has not ended and names one of these levels, and which."""
    return (await conn.execute(_JOB_WITH_LEVEL, {"levels": list(levels)})).one_or_none()


async def write_policy(conn: AsyncConnection, settings: Mapping[str, Any]) -> None:
    """Set these fields and no others."""
    await conn.execute(_WRITE, {"settings": dump_json(dict(settings))})
