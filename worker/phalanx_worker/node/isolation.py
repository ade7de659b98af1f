"""What holds the ranks of one group off the rest of the node: control group, cores, mounts, the size of /dev/shm.

Owns finding out what this node can enforce, and preparing it for each group. The guardian and its ranks step in
(`runtime/confine.py`, `runtime/mounts.py`).
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from phalanx_worker.node import mounts, users
from phalanx_worker.node.cgroups import Cgroup, Cgroups, Limits
from phalanx_worker.node.mounts import Allowed
from phalanx_worker.node.orders import GroupOrder, StartFailed
from phalanx_worker.runtime.spec import CgroupSpec, MountSpec

log = logging.getLogger("phalanx.node.isolation")

_PROBE_TIMEOUT_S = 30.0
_OTHERWISE = {  # what is done where the kernel keeps no such limit
    "memory": "memory by watching",
    "cpu": "CPUs by choice of cores",
    "pids": "processes not limited",
}


@dataclass
class Cores:
    """Cores of the runner, shared out to groups where the kernel gives no share of CPU time: the least used first, of
    these in the order of `own`.

    Soft: a group that was told nothing, or another runner on this machine, may run on the same. Runners know nothing of
    each other, so each begins somewhere else: else the first group of each would have the same cores.
    """

    own: list[int] = field(default_factory=lambda: _turned(sorted(os.sched_getaffinity(0))))
    _groups: Counter[int] = field(default_factory=Counter)

    def take(self, cpus: int) -> list[int] | None:
        """None: all, since so many are wanted or nothing was said."""
        if not 0 < cpus < len(self.own):
            return None
        taken = sorted(self.own, key=lambda core: self._groups[core])[:cpus]
        self._groups.update(taken)
        return taken

    def give_back(self, cores: list[int]) -> None:
        self._groups.subtract(cores)


@dataclass
class Confinement:
    """Of one group; `release` once nothing of it is left, as often as one likes."""

    cores_of_node: Cores
    cgroup: Cgroup | None = None
    watched_memory_bytes: int = 0  # that the runner has to keep, as the kernel does not; 0: nothing to do
    cores: list[int] | None = None
    private: bool = False
    mounts: list[MountSpec] = field(default_factory=list)

    @property
    def cgroup_spec(self) -> CgroupSpec | None:
        return self.cgroup.spec if self.cgroup is not None else None

    def oom(self) -> str:
        """Who was out of memory when the kernel ended one of its processes: `group`, `node`; "" if it ended none."""
        return self.cgroup.oom() if self.cgroup is not None else ""

    def release(self) -> None:
        if self.cgroup is not None:
            self.cgroup.remove()
        cores, self.cores = self.cores, None  # at once: two threads may release it
        if cores is not None:
            self.cores_of_node.give_back(cores)


@dataclass
class Isolation:
    """Of one node. `private_problem`: why ranks cannot have mounts of their own; "" if they can."""

    cgroups: Cgroups
    private_problem: str
    allowed: list[Allowed]
    cores: Cores = field(default_factory=Cores)
    _starting: dict[str, Confinement] = field(default_factory=dict)

    @classmethod
    def find(cls, python: str, env: Mapping[str, str], *, allowed: list[str]) -> Isolation:
        """Blocks for as long as an interpreter takes to start. Raises ValueError for a mistake in `allowed`."""
        read = [Allowed.read(text) for text in allowed]
        found = cls(Cgroups.find(), private_mounts_problem(python, env), read)
        log.info("limits of each group: %s", found.in_words)
        return found

    @property
    def in_words(self) -> str:
        enforced = [name for name in _OTHERWISE if self.cgroups.enforces(name)]
        by_kernel = f"{', '.join(enforced)} by control groups v{self.cgroups.version}" if enforced else ""
        watched = ", ".join(words for name, words in _OTHERWISE.items() if name not in enforced)
        watched += f" ({self.cgroups.problem})" if watched and self.cgroups.problem else ""
        mounts_of_own = "own mounts" if not self.private_problem else f"no own mounts ({self.private_problem})"
        return "; ".join(filter(None, [by_kernel, watched, mounts_of_own]))

    def prepare(self, order: GroupOrder, uid: int | None) -> Confinement:
        """Raises StartFailed, with nothing left behind. Who does not get to use it calls `discard`."""
        launch = order.desired.launch
        private = not self.private_problem
        planned = mounts.plan(
            launch.mounts,
            self.allowed,
            private=private,
            may_write=lambda path: users.may_write(path, uid),
            may_enter=lambda path, below: users.may_enter(path, uid, below=below),
        )
        mounts.expect_shm(launch.shm_bytes, private=private)
        confinement = Confinement(self.cores, private=private, mounts=planned, cgroup=self._cgroup(order))
        self._starting[order.name] = confinement
        if not self.cgroups.enforces("memory"):
            confinement.watched_memory_bytes = order.memory_limit_bytes
        if not self.cgroups.enforces("cpu"):
            confinement.cores = self.cores.take(order.cpus)
        return confinement

    def discard(self, order: GroupOrder) -> None:
        """Of a start that came to nothing, perhaps before anybody had what `prepare` answered."""
        if (confinement := self._starting.pop(order.name, None)) is not None:
            confinement.release()

    def started(self, order: GroupOrder) -> None:
        """From now on its group releases it."""
        self._starting.pop(order.name, None)

    def _cgroup(self, order: GroupOrder) -> Cgroup | None:
        if not self.cgroups.parents:
            return None
        limits = Limits(order.memory_limit_bytes, order.cpu_limit)
        try:
            return self.cgroups.make(order.name, limits)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise StartFailed(f"the limits of the attempt cannot be set on this node: {reason}") from error


def _turned(cores: list[int]) -> list[int]:
    first = random.randrange(len(cores))
    return cores[first:] + cores[:first]


def private_mounts_problem(python: str, env: Mapping[str, str]) -> str:
    """Tried out, since capabilities alone do not tell: a container's profile may forbid mounting all the same."""
    command = [python, "-m", "phalanx_worker.runtime.mounts"]
    try:
        probe = subprocess.run(
            command, env=dict(env), cwd="/", capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if probe.returncode == 0 else (probe.stderr.strip().splitlines() or ["unknown"])[-1]
