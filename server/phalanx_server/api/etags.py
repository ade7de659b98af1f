"""ETag and If-Match: a change says which version it was made for, so that no concurrent one is lost."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header

from phalanx_server.api.deps import Services
from phalanx_server.api.errors import Problem, not_found
from phalanx_server.store.tenant_views import load_tenant

IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", max_length=64, description="The ETag that was read, or `*` to change whatever is there."),
]


def etag(version: int) -> str:
    return f'"{version}"'


async def version_for(services: Services, tenant: str, if_match: str | None) -> int:
    """The version of a tenant that a change is for; `*` = the one it has now. Raises Problem 428 where none is said,
    412 where none can match, 404 where there is no such tenant."""
    if if_match is None:
        raise Problem("precondition_required", "Say in If-Match which ETag the change is for.")
    if if_match.strip() != "*":
        return _version(if_match)
    async with services.reads.connect() as conn:
        row = await load_tenant(conn, tenant)
    if row is None:
        raise not_found(f"tenant {tenant[:200]}")
    return row.version


def expected_version(if_match: str) -> int | None:
    """The version that a change is for; None = whatever there is. Raises Problem 412 where none can match."""
    return None if if_match.strip() == "*" else _version(if_match)


def _version(if_match: str) -> int:
    digits = if_match.strip().removeprefix("W/").strip('"')
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise Problem("etag_mismatch", f"{if_match} is not the ETag of any version. Read it again.")
    return int(digits)
