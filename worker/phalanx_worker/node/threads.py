"""Blocking work in a thread that is never left behind.

Owns the one difference to `asyncio.to_thread`: who gives such a call up goes on only when its thread has ended, so that
nobody cleans up behind a thread that still writes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a thread. Cancelled, it first waits for the thread; the result, or error, is lost then. A
    `threading.Event` among the arguments is set, for work that looks whether it is still wanted."""
    thread = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(thread)
    finally:
        for given_up in (each for each in args if isinstance(each, threading.Event)):
            given_up.set()
        while not thread.done():
            try:
                await asyncio.wait([thread])
            except asyncio.CancelledError:
                continue  # it has been cancelled already, and goes on being so
