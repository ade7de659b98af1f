"""Control groups: memory, CPU time and the number of processes of each group of ranks, enforced by the kernel.

Owns finding the runner's own control group (v2, or the hierarchies of v1), a parent `phalanx` below it, and in that one
control group for each group of ranks. Nothing but the runner may write there. Where the kernel lets nobody, `problem`
says so, and `watch.py` looks after memory instead.
v2 allows no processes in a control group that hands controllers down. So the runner first moves all that is in its own
into a leaf `phalanx.node` beside the parent. It does so only where the control group is its own to divide: that of a
container, or one that systemd has delegated.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from phalanx_worker.node import processes
from phalanx_worker.runtime import confine
from phalanx_worker.runtime.spec import CgroupSpec

log = logging.getLogger("phalanx.node.cgroups")

MOST_PROCESSES = 32_768  # of one group of ranks, or of one build of an environment; threads counted
_CPU_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1_000
_CONTROLLERS = ("memory", "cpu", "pids")
_PARENT, _LEAF = "phalanx", "phalanx.node"
_MOVES = 50
_MAKES = 100
_KILLS, _KILL_AGAIN_S = 250, 0.02
# The last group to leave removes the parent, also while another makes its own in it. EEXIST: there, then no directory.
_GOING = frozenset({errno.ENOENT, errno.EEXIST, errno.ENODEV})
_OPTIONAL = frozenset({"memory.swap.max", "memory.memsw.limit_in_bytes"})  # a kernel may account for no swap


@dataclass(frozen=True)
class Limits:
    """0: none."""

    memory_bytes: int = 0
    cpus: float = 0.0


@dataclass(frozen=True)
class Cgroup:
    """That of one group of ranks: its directory by controller, in v2 the same for all."""

    spec: CgroupSpec
    memory: Path | None
    version: int

    def oom(self) -> str:
        """Who was out of memory when the kernel ended one of its processes: `group`, `node`; "" if it ended none."""
        if self.memory is None:
            return ""
        if self.version == 2:
            events = _counters(self.memory / "memory.events")
            return "" if not events.get("oom_kill") else "group" if events.get("oom") else "node"
        if not _counters(self.memory / "memory.oom_control").get("oom_kill"):
            return ""
        peak, limit = (_number(self.memory / f"memory.{name}_in_bytes") for name in ("max_usage", "limit"))
        return "group" if peak >= limit - (1 << 20) else "node"

    def remove(self) -> None:
        """To be called when no process is left in it."""
        confine.remove(self.spec)
        for directory in self.spec.directories:
            with contextlib.suppress(OSError):  # others are in it
                Path(directory).parent.rmdir()


@dataclass(frozen=True)
class Cgroups:
    """`parents` has the parent of the groups' control groups for each controller that is enforced here."""

    version: int = 0
    parents: dict[str, Path] = field(default_factory=dict)
    problem: str = ""  # why a controller is not enforced, in words for an operator; "" if all are

    @classmethod
    def find(cls) -> Cgroups:
        """Prepare what this machine offers; never raises."""
        own = own_cgroups(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
        try:
            return _version_2(own[""]) if "memory" in _available(own.get("")) else _version_1(own)
        except OSError as error:
            return cls(problem=f"no control group can be made here ({error.filename}: {error.strerror})")

    def enforces(self, controller: str) -> bool:
        return controller in self.parents

    def make(self, name: str, limits: Limits) -> Cgroup:
        """Raises OSError, with nothing left behind."""
        directories = {controller: parent / name for controller, parent in self.parents.items()}
        spec = self._spec(name)
        try:
            for directory in map(Path, spec.directories):
                self._make(directory)
            for controller, directory in directories.items():
                for file, value in _SETTINGS[self.version, controller](limits):
                    _write(directory / file, value)
        except OSError:
            confine.remove(spec)
            raise
        return Cgroup(spec, directories.get("memory"), self.version)

    def clear(self, name: str) -> None:
        """End and remove what an earlier runner left of this name. Its processes are all in it, whatever they hide."""
        spec = self._spec(name)
        for directory in filter(Path.exists, map(Path, spec.directories)):
            confine.end(spec)
            for _ in range(_KILLS):
                pids = _pids_in(directory)
                processes.kill(pids)
                if not pids:
                    break
                time.sleep(_KILL_AGAIN_S)
        confine.remove(spec)

    def _spec(self, name: str) -> CgroupSpec:
        unique = [parent / name for parent in dict.fromkeys(self.parents.values())]
        limit = [(str(self.parents["pids"] / name / "pids.max"), "0")] if "pids" in self.parents else []
        return CgroupSpec(
            join=[str(directory / "cgroup.procs") for directory in unique],
            end=[*limit, *[(str(directory / "cgroup.kill"), "1") for directory in unique if self.version == 2]],
            directories=[str(directory) for directory in unique],
        )

    def _make(self, directory: Path) -> None:
        for again in reversed(range(_MAKES)):
            try:
                directory.parent.mkdir(exist_ok=True)
                if self.version == 2:
                    _hand_down(directory.parent)  # also where another runner has just made it, and not come to this
                return directory.mkdir(exist_ok=True)
            except OSError as error:
                if error.errno not in _GOING or not again:
                    raise


# ------------------------------------------------------------------ what is written


def _memory_2(limits: Limits) -> list[tuple[str, str]]:
    """All of its processes count, with the files that they keep in memory. The kernel ends only the largest, so that
    one sees which rank it was; the runner ends the others."""
    return [("memory.max", str(limits.memory_bytes)), ("memory.swap.max", "0")] if limits.memory_bytes else []


def _memory_1(limits: Limits) -> list[tuple[str, str]]:
    size = str(limits.memory_bytes)
    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")  # the second may not be below the first
    return [(name, size) for name in names] if limits.memory_bytes else []


def _quota_us(limits: Limits) -> int:
    return max(_LEAST_QUOTA_US, round(limits.cpus * _CPU_PERIOD_US))


def _cpu_2(limits: Limits) -> list[tuple[str, str]]:
    return [("cpu.max", f"{_quota_us(limits)} {_CPU_PERIOD_US}")] if limits.cpus else []


def _cpu_1(limits: Limits) -> list[tuple[str, str]]:
    period = ("cpu.cfs_period_us", str(_CPU_PERIOD_US))
    return [period, ("cpu.cfs_quota_us", str(_quota_us(limits)))] if limits.cpus else []


def _pids(_: Limits) -> list[tuple[str, str]]:
    return [("pids.max", str(MOST_PROCESSES))]


_SETTINGS = {
    (2, "memory"): _memory_2,
    (2, "cpu"): _cpu_2,
    (2, "pids"): _pids,
    (1, "memory"): _memory_1,
    (1, "cpu"): _cpu_1,
    (1, "pids"): _pids,
}


def _write(path: Path, value: str) -> None:
    """A limit that is not set is an error, also where its file is missing."""
    if path.exists() or path.name not in _OPTIONAL:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(fd)


# ------------------------------------------------------------------ what is there


def own_cgroups(membership: str, mounts: str) -> dict[str, Path]:
    """The directory of this process's control group by controller of v1, and that of v2 under ""; from the text of
    /proc/self/cgroup and /proc/self/mountinfo. What is mounted nowhere is left out."""
    places = dict(_hierarchies(mounts))
    found = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in places:
                root, mount_point = places[controller]
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                found[controller] = mount_point / inside
    return found


def _hierarchies(mounts: str) -> list[tuple[str, tuple[Path, Path]]]:
    """(controller, or "" for v2; (what of the hierarchy is mounted, and where)), from /proc/self/mountinfo."""
    found = []
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        root, mount_point = fields.split()[3:5]
        kind, _, options = rest.split(" ", 2)
        names = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
        found += [(name, (Path(root), Path(mount_point))) for name in names]
    return found


def _available(directory: Path | None) -> list[str]:
    try:
        return (directory / "cgroup.controllers").read_text().split() if directory is not None else []
    except OSError:
        return []


def _version_2(own: Path) -> Cgroups:
    own = own.parent if own.name == _LEAF else own
    if not (own / _LEAF).exists() and not _is_ours(own):
        return Cgroups(problem=f"{own} belongs to others: neither a container's nor delegated by systemd")
    if (own / "cgroup.events").exists():  # not the machine's root, which may have both
        _empty(own)
    _hand_down(own)
    handed_down = (own / "cgroup.subtree_control").read_text().split()
    controllers = [name for name in _CONTROLLERS if name in handed_down]
    missing = [name for name in _CONTROLLERS if name not in controllers]
    return Cgroups(
        2, dict.fromkeys(controllers, own / _PARENT), f"no controller {', '.join(missing)}" if missing else ""
    )


def _is_ours(own: Path) -> bool:
    """The root of what is visible, as in a container, or delegated to us as systemd marks it."""
    if own.is_mount():
        return True
    with contextlib.suppress(OSError):
        return os.getxattr(own, "user.delegate") == b"1"
    return False


def _empty(own: Path) -> None:
    """Move every process into the leaf, also those that are started meanwhile."""
    leaf = own / _LEAF
    leaf.mkdir(exist_ok=True)
    for _ in range(_MOVES):
        pids = (own / "cgroup.procs").read_text().split()
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)


def _hand_down(directory: Path) -> None:
    """Raises OSError, also where there is no such control group any more."""
    for name in set(_CONTROLLERS) & set((directory / "cgroup.controllers").read_text().split()):
        (directory / "cgroup.subtree_control").write_text(f"+{name}")


def _version_1(own: dict[str, Path]) -> Cgroups:
    parents, problems = {}, []
    for controller in _CONTROLLERS:
        try:
            parent = own[controller] / _PARENT
            if lacking := _lacking(own[controller], controller):
                problems.append(f"the kernel has no {lacking}")
            else:
                parents[controller] = parent
        except KeyError:
            problems.append(f"no controller {controller}")
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    return Cgroups(1, parents, "; ".join(problems))


def _lacking(own: Path, controller: str) -> str:
    """The file that a limit needs and that a control group made here lacks, such as those for CPU time in a kernel
    without; "" if none. Tried out beside the parent, which other runners' groups come to and leave meanwhile."""
    needed = [file for file, _ in _SETTINGS[1, controller](Limits(1, 1.0)) if file not in _OPTIONAL]
    trial = Path(tempfile.mkdtemp(prefix=f"{_PARENT}-", dir=own))
    try:
        return next((file for file in needed if not (trial / file).exists()), "")
    finally:
        trial.rmdir()


def _pids_in(directory: Path) -> list[int]:
    try:
        return [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _counters(path: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
