"""Units of work that are run once more when PostgreSQL has ended them to undo a deadlock.

Owns the one place where that is done, and what is taken for one. Locks are taken in one order (`store.attempts`; within
a table by id), but not all can be: whom the end of a job lets go on is found out when other jobs are locked already. Of
those that wait for each other PostgreSQL then gives one up, after a second. Its transaction has left nothing, so it may
run again, and finds the other's done; a second deadlock in a row is told.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError

from phalanx_server.store.engine import is_deadlock

log = structlog.get_logger("phalanx.transactions")

P = ParamSpec("P")
T = TypeVar("T")


def rerun_on_deadlock(work: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """For a function that makes its transactions itself, and does nothing that running it again would do twice: what
    it does outside of the last one is harmless to repeat, and its arguments can be read again."""

    @wraps(work)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await work(*args, **kwargs)
        except DBAPIError as error:
            if not is_deadlock(error):
                raise
            log.info("deadlock; run again", work=work.__name__)
        return await work(*args, **kwargs)

    return run
