"""The schema revision of a live connection, without Alembic: cheap enough for a readiness probe."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection


async def read_revision(conn: AsyncConnection) -> str | None:
    """None where the database has never been migrated."""
    try:
        return (await conn.execute(text("SELECT version_num FROM alembic_version"))).scalar_one_or_none()
    except ProgrammingError:  # the table does not exist
        return None
