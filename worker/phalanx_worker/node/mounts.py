"""Which directories of the node the ranks of a group may see under which path.

Owns the operator's list of what may be mounted, and the check of a job's mounts against it. The mounting itself is the
guardian's (`runtime/mounts.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from phalanx_worker.node.orders import StartFailed
from phalanx_worker.protocol import Mount
from phalanx_worker.runtime.spec import MountSpec

MayWrite = Callable[[str], bool]
MayEnter = Callable[[str, str], bool]


@dataclass(frozen=True)
class Allowed:
    """A directory that jobs may mount, with all below it that their user may enter."""

    path: str
    read_only: bool

    @classmethod
    def read(cls, text: str) -> Allowed:
        """From `/srv/datasets` or `/srv/datasets:ro`. Raises ValueError."""
        path, colon, mode = text.partition(":")
        if not path.startswith("/") or (colon and mode not in ("ro", "rw")):
            raise ValueError(f"{text!r} is no directory to allow: write /srv/datasets or /srv/datasets:ro")
        return cls(path, read_only=mode == "ro")

    @property
    def root(self) -> str:
        """As it really is."""
        return os.path.realpath(self.path)

    def holds(self, real_path: str) -> bool:
        return _is_within(real_path, self.root)

    @property
    def as_written(self) -> str:
        return f"{self.path}:ro" if self.read_only else self.path

    def __str__(self) -> str:
        return f"{self.path} (read-only)" if self.read_only else self.path


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def plan(
    mounts: Iterable[Mount], allowed: list[Allowed], *, private: bool, may_write: MayWrite, may_enter: MayEnter
) -> list[MountSpec]:
    """What is to be mounted, with its source as it really is. Raises StartFailed naming the source, and what may be:
    for this node only, another may have another list and other directories.

    Where ranks cannot have mounts of their own (`private` is false) nothing can be, and only a directory at its own
    path, as it is, is had without. `may_write` tells whether the ranks' user may write to one, `may_enter` whether it
    may enter one from another above it: a mount must not lead past directories that are closed to it.
    """
    planned = []
    for mount in mounts:
        source = os.path.realpath(mount.source)
        holders = _expect_allowed(mount, source, allowed)
        if not Path(source).is_dir():
            raise StartFailed(f"mount {mount.source}: there is no such directory on this node")
        target = source if os.path.realpath(mount.target) == source else mount.target
        if not private:
            _expect_as_it_is(mount, source, target, may_write)
            continue
        if not any(may_enter(source, each.root) for each in holders):
            raise StartFailed(f"mount {mount.source}: the job's user may not enter it")
        planned.append(MountSpec(source, target, mount.read_only))
    return planned


def _expect_allowed(mount: Mount, source: str, allowed: list[Allowed]) -> list[Allowed]:
    """What allows it; the nearest says whether to write, of two alike the stricter. Raises StartFailed."""
    holders = [each for each in allowed if each.holds(source)]
    if not holders:
        leads_out = any(each.holds(mount.source) for each in allowed)  # else it is nobody's business where it leads
        through = f" (which is {source})" if leads_out else ""
        listed = ", ".join(map(str, allowed)) or "nothing"
        said = f"mount {mount.source}{through}: the operator allows {listed} to be mounted (--allow-mount)"
        raise StartFailed(said)
    if mount.read_only:
        return holders
    nearest = max(holders, key=lambda each: (len(each.root), each.read_only))
    if nearest.read_only:
        said = f"mount {mount.source}: the operator allows {nearest}, so it needs read_only: true"
        raise StartFailed(said)
    if inner := next((each for each in allowed if each.read_only and _is_within(each.root, source)), None):
        said = f"mount {mount.source}: it holds {inner.path}, which the operator allows only to be read; set "
        raise StartFailed(f"{said}read_only: true, or mount what lies beside it")
    return holders


def _expect_as_it_is(mount: Mount, source: str, target: str, may_write: MayWrite) -> None:
    """Raises StartFailed unless the ranks get what they ask for without any mount."""
    if target != source:
        raise StartFailed(
            f"mount {mount.source}: this node cannot mount for one job (the runner lacks CAP_SYS_ADMIN), so the target "
            f"must be {source} itself, not {mount.target}"
        )
    if mount.read_only and may_write(source):
        raise StartFailed(
            f"mount {mount.source}: this node cannot make it read-only for one job (the runner lacks CAP_SYS_ADMIN); "
            "take away the user's right to write there, or set read_only: false"
        )


def expect_shm(shm_bytes: int, *, private: bool) -> None:
    """Raises StartFailed where /dev/shm must be larger than it is and cannot be the group's own."""
    if not shm_bytes or private:
        return
    status = os.statvfs("/dev/shm")
    has_bytes = status.f_blocks * status.f_frsize
    if has_bytes < shm_bytes:
        raise StartFailed(
            f"run.shm asks for {shm_bytes >> 20} MiB, and /dev/shm of this node has {has_bytes >> 20} MiB; the runner "
            "lacks CAP_SYS_ADMIN to give the job one of its own"
        )
