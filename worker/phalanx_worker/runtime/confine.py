"""The control group that holds the ranks of one group, from inside: joined by each rank before anything of a user runs.

Owns joining, ending and removing it, through the files that the runner names. Knows no limit: the runner has set them
(see `node/cgroups.py`). The guardian stays outside: a limit must not hit who has to tell how the ranks ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

from phalanx_worker.runtime.spec import CgroupSpec

_REMOVE_TRIES = 100
_REMOVE_AGAIN_S = 0.02
_STORE_BYTES = 1 << 30  # what a rendezvous store may grow to, which ranks fill


def enter(cgroup: CgroupSpec | None, cores: list[int] | None) -> None:
    """Put this process, and so all that it will start, into the control group and onto the cores."""
    for path in cgroup.join if cgroup else []:
        Path(path).write_text("0")
    if cores:
        os.sched_setaffinity(0, cores)


def end(cgroup: CgroupSpec | None) -> None:
    """No more forks, so that killing comes to an end even against a fork bomb; and kill, where the kernel can."""
    for path, value in cgroup.end if cgroup else []:
        with contextlib.suppress(OSError):
            Path(path).write_text(value)


def remove(cgroup: CgroupSpec | None) -> None:
    """Remove it, a moment after its last process has ended. Nothing there is fine."""
    for directory in cgroup.directories if cgroup else []:
        for _ in range(_REMOVE_TRIES):
            try:
                Path(directory).rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(_REMOVE_AGAIN_S)
            else:
                break


def bound_own_memory() -> None:
    """What ranks put into the store lies in the guardian, outside of their limit: give that one of its own."""
    status = Path("/proc/self/status").read_text()
    data_kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:")), 0)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (data_kib * 1024 + _STORE_BYTES, resource.RLIM_INFINITY))
