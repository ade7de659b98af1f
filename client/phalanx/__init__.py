"""Phalanx: submit training jobs (`Client`, `AsyncClient`) and speak from inside one (`report`, `checkpoint`, …).

Owns the public names only. `import phalanx` loads nothing else, so that a training script pays nothing for it: each
name is imported from its module the first time it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.client import AsyncClient, Client
    from phalanx.job import alive, checkpoint, finished, report, should_stop

_HOMES = {
    "Client": "phalanx.client",
    "AsyncClient": "phalanx.client",
    "report": "phalanx.job",
    "checkpoint": "phalanx.job",
    "should_stop": "phalanx.job",
    "finished": "phalanx.job",
    "alive": "phalanx.job",
}

__all__ = ["AsyncClient", "Client", "alive", "checkpoint", "finished", "report", "should_stop"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
