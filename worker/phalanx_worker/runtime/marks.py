"""Notice two moments of training from outside the script: the process group is up, the first optimizer step is done.

Owns the hook on the first, which takes itself away after its moment. The hook on optimizer steps is that of
`profiles.py`, which stays: torch goes through a dictionary of those, and one that took itself away would break a
script that has registered another.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from phalanx import job

from phalanx_worker.runtime import profiles


def install() -> None:
    """Put the hooks in place, if torch is loaded in this process."""
    if "torch" not in sys.modules:
        return
    with contextlib.suppress(ImportError, AttributeError):  # another torch, without that moment: the mark stays unset
        profiles.install(first_step=lambda: job.mark("first_step"))
    with contextlib.suppress(ImportError, AttributeError):
        _mark_rendezvous()


def after_torch(install: Callable[[], None]) -> None:
    """Call it as soon as this process has imported torch, if it ever does."""
    sys.meta_path.insert(0, _TorchWatcher(install))


class _TorchWatcher:
    """Finds nothing itself; it sees the import of torch pass and adds one call to its end."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _after_execution(spec.loader, self._call)
        return spec


def _after_execution(loader: Any, call: Callable[[], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        del loader.exec_module
        execute(module)
        call()

    loader.exec_module = exec_module


def _mark_rendezvous() -> None:
    import torch.distributed  # loaded already, this only gives it a name

    distributed: Any = torch.distributed
    homes = [distributed, distributed.distributed_c10d]
    original = distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for home in homes:
            if home.init_process_group is init_process_group:
                home.init_process_group = original
        job.mark("rendezvous")
        return result

    for home in homes:
        home.init_process_group = init_process_group
