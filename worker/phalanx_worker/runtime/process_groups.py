"""Keep gloo's process groups alive to the end of a rank, so that none is destroyed while Python holds its lock.

A model in DistributedDataParallel holds the last reference to its process group once `destroy_process_group` has run.
When that model goes (at the end of `main()`, say), the group's destructor joins gloo's threads with the GIL held; and a
thread that is just then dropping a finished collective's Python state waits for the GIL: a deadlock, seen in one job of
a few on a busy host with torch 2.13. A rank ends by `os._exit`, so a destructor that never runs is no loss.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

_kept: list[Any] = []


def install() -> None:
    """Make `destroy_process_group` leave gloo's groups to the end of the process, if torch is loaded in it."""
    if "torch" not in sys.modules:
        return
    import torch.distributed  # loaded already: this only gives it a name

    if torch.distributed.is_available():
        _keep_what_is_destroyed(torch.distributed)


def _keep_what_is_destroyed(distributed: Any) -> None:
    home = distributed.distributed_c10d
    original = distributed.destroy_process_group

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> Any:
        _kept.extend(group for group in home._world.pg_map if _is_gloo(distributed, group))
        return original(*args, **kwargs)

    for place in (distributed, home):
        place.destroy_process_group = destroy_process_group


def _is_gloo(distributed: Any, group: Any) -> bool:
    return "gloo" in str(distributed.get_backend(group)) and not any(group is kept for kept in _kept)
