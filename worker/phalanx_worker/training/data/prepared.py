"""What is made once per node from the data and then mapped into memory: tokens, indices, fixed-width records.

Owns the directory for it and that each thing is made by one process while the others wait, and is whole or not there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

log = logging.getLogger("phalanx.training.data")


def directory(given: str | None = None) -> Path:
    """Where prepared files lie: as given, or `PHALANX_DATA_CACHE`, or the user's own under the temporary directory.
    Raises PermissionError where somebody else owns the last one."""
    chosen = given or os.environ.get("PHALANX_DATA_CACHE")
    path = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"phalanx-data-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not chosen and path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user; set data.cache or PHALANX_DATA_CACHE")
    return path


def prepared(name: str, make: Callable[[IO[bytes]], None], *, cache: str | None = None) -> Path:
    """The file `name`, made by `make(stream)` unless it is there already. The name must say all that it depends on."""
    path = directory(cache) / name
    if path.exists():
        return path
    with open(path.with_name(f".{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # nobody made it while we waited
            _make(path, make)
    return path


def _make(path: Path, make: Callable[[IO[bytes]], None]) -> None:
    began = time.monotonic()
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as stream:
        make(stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    log.info("prepared %s: %d bytes in %.1f s", path, path.stat().st_size, time.monotonic() - began)
