"""Threads for one kind of files: storage that hangs holds up these, and nothing else of the process.

Plans, the page of the metrics and lookups of names are made in asyncio's own threads, of which there are few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

THREADS = 16

T = TypeVar("T")


class StorageThreads:
    """THREADS of them, made when they are needed."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=name)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What `asyncio.to_thread` does, in one of these."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
