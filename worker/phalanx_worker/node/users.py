"""Whether ranks can run as their tenant's own Unix user on this node, and what that user may do.

Owns the tests: root, and the user reaches what a rank needs to read. They are made by a process of that user, since
only the kernel knows.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_UNPRIVILEGED_UID = 65533  # stands for any tenant: none of them owns anything on the node
_CHECK_TIMEOUT_S = 10.0


def needed_files(python: str) -> list[str]:
    """What a rank reads at the latest in its first import."""
    packages = [
        spec.origin
        for name in ("phalanx", "phalanx_worker.runtime", "torch")
        if (spec := find_spec(name)) and spec.origin
    ]
    return [str(Path(python).resolve()), os.__file__, *packages] if python == sys.executable else [python]


async def own_users_problem(python: str, data_dir: Path) -> str:
    """ "" if ranks can run under own users, else why not, in words for an operator."""
    if os.geteuid() != 0:
        return "the runner is not root, so ranks run as its own user"
    for path in [*needed_files(python), str(data_dir / "attempts")]:
        if not await _readable(path, _UNPRIVILEGED_UID):
            return f"other users cannot read {path}, so ranks run as the runner's user"
    return ""


async def _readable(path: str, uid: int) -> bool:
    return await asyncio.to_thread(_may, "-r", path, uid)


def may_write(path: str, uid: int | None) -> bool:
    """Whether that user may (None: this process's own). Blocks for as long as a shell takes to start."""
    return os.access(path, os.W_OK) if uid is None else _may("-w", path, uid)


def may_enter(path: str, uid: int | None, *, below: str) -> bool:
    """Whether that user gets from `below`, wherever that lies, down into `path`. Blocks as `may_write` does."""
    if uid is None:
        return os.access(path, os.X_OK)
    return _may("-x", os.path.relpath(path, below), uid, start=below)


def _may(what: str, path: str, uid: int, *, start: str = "/") -> bool:
    """Not by asyncio itself: in an actor Ray runs uvloop, whose subprocesses know no `user`."""
    command = ["/bin/sh", "-c", f'test {what} "$1"', "sh", path]
    try:
        test = subprocess.run(
            command, user=uid, group=uid, extra_groups=[], env={}, cwd=start, timeout=_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return test.returncode == 0
