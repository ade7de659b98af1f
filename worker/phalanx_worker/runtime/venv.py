"""A virtual environment on top of the node's own Python: how it is laid out, and how a process that runs becomes part.

Owns the file that lets an environment see what the node's Python has, and `enter`, for a fork of a warm process that
knows nothing of the environment. Nothing of an environment is executed before `enter`: its `.pth` files are its
tenant's code, so a process must have become the tenant's user by then.
"""

from __future__ import annotations

import importlib
import site
import sys
from pathlib import Path
from typing import Any

# Sorted last, so that what the environment's own .pth files add is found before what the node's Python has.
_BASE_PTH = "zzz-phalanx-base.pth"


def packages_directory(venv: str) -> str:
    return "{}/lib/python{}.{}/site-packages".format(venv, *sys.version_info)


def add_base(venv: str) -> None:
    """Let the environment see what this interpreter has."""
    lines = [f"import site; site.addsitedir({directory!r})\n" for directory in site.getsitepackages()]
    Path(packages_directory(venv), _BASE_PTH).write_text("".join(lines))


def enter(venv: str) -> None:
    """Make this process, forked from one of the node's Python, search as one of the environment's would."""
    before, base = list(sys.path), site.getsitepackages()
    sys.prefix = sys.exec_prefix = venv
    sys.executable = f"{venv}/bin/python"
    site.PREFIXES[:] = [venv]
    site.addsitedir(packages_directory(venv))
    added = [entry for entry in sys.path if entry not in before]
    first = next((index for index, entry in enumerate(before) if entry in base), len(before))
    sys.path[:] = [*before[:first], *added, *before[first:]]
    importlib.invalidate_caches()
    loaded: dict[str, Any] = dict(sys.modules)
    if spawn := loaded.get("multiprocessing.spawn"):
        spawn.set_executable(sys.executable)
