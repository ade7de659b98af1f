"""The database engine: the one place that says how a process connects to PostgreSQL.

Owns pool sizes, session settings, JSON encoding, and what an error says of who is to blame. Knows no table.
"""

import json
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 30.0
NO_ANSWER_S = 5.0  # beyond a statement's own time: then the server is taken for gone
POOL_WAIT_S = 15.0
IDLE_IN_TRANSACTION_S = 60.0  # no action waits for anything else within one


def create_engine(
    url: str,
    *,
    pool_size: int = 12,
    application_name: str = "phalanx",
    statement_timeout_s: float = STATEMENT_TIMEOUT_S,
) -> AsyncEngine:
    """An async engine for `url` (`postgresql://` is read as `postgresql+asyncpg://`).

    Sessions run in UTC at READ COMMITTED, which every guard of the actions is written for. No statement takes longer
    than `statement_timeout_s`: one that waits for a lock gives its connection back. A process that stops or is cut off
    within a transaction loses it, and its locks, after IDLE_IN_TRANSACTION_S.
    """
    return create_async_engine(
        with_driver(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        pool_pre_ping=False,
        pool_recycle=1800,
        json_serializer=dump_json,
        hide_parameters=True,  # errors are logged, and values are hashes of tokens, secrets, users' code
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": statement_timeout_s + NO_ANSWER_S,
            "server_settings": {
                "application_name": application_name,
                "timezone": "UTC",
                "jit": "off",
                "statement_timeout": str(round(statement_timeout_s * 1000)),
                "idle_in_transaction_session_timeout": str(round(IDLE_IN_TRANSACTION_S * 1000)),
            },
        },
    )


def with_driver(url: str) -> str:
    """`url` with asyncpg as its driver. ValueError where it names no PostgreSQL database."""
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(f"the database must be PostgreSQL, not {parsed.get_backend_name()}")
    return parsed.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)


def driver_dsn(url: str) -> str:
    """`url` in the form that asyncpg itself reads."""
    return make_url(with_driver(url)).set(drivername="postgresql").render_as_string(hide_password=False)


def dump_json(value: Any) -> str:
    """Compact JSON; NaN and infinities are refused, because PostgreSQL's jsonb cannot hold them."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def is_of_the_data(error: DBAPIError) -> bool:
    """SQLSTATE classes 22 (data exception) and 23 (integrity constraint violation): what was sent is to blame."""
    state = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, IntegrityError | DataError) or state[:2] in ("22", "23")


def is_deadlock(error: DBAPIError) -> bool:
    """SQLSTATE 40P01: transactions waited for each other, and this one was given up for the others."""
    return getattr(error.orig, "sqlstate", None) == "40P01"
