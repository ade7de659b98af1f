"""Mounts that only one group sees: its guardian leaves the node's mount table for a copy of its own.

Owns the calls to the kernel (unshare, mount, open_tree, mount_setattr, move_mount) and the care against links that
somebody puts in the way. What may be mounted has been decided before (`node/mounts.py`).
`python -m phalanx_worker.runtime.mounts` tells whether this node lets us: it ends with the reason, or with nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from phalanx_worker.runtime.spec import GroupSpec, MountSpec

_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 16384, 1 << 18
_AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE = 0x1000, 0x8000, 1
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # on every architecture; Linux 5.12

_SHM = "/dev/shm"

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The group cannot have what it asks for; the message is for the user."""


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def enter(group: GroupSpec) -> None:
    """Give this process, and so all that it will start, mounts of its own. Raises Refused."""
    if not group.private:
        return
    try:
        leave_the_nodes(group.shm_bytes)
    except OSError as error:
        raise Refused(f"the ranks cannot have mounts of their own: {error.strerror}") from error
    for mount in group.mounts:
        try:
            _bind(mount)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            reason = f"{where}{error.strerror}"
            raise Refused(f"{mount.source} cannot be mounted on {mount.target}: {reason}") from error


def leave_the_nodes(shm_bytes: int) -> None:
    """An own copy of the mount table, of which nothing gets out, and an own, empty /dev/shm; System V's memory too."""
    size_bytes = shm_bytes or _size_bytes(_SHM)
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", _SHM, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size_bytes}")


def _size_bytes(path: str) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _bind(mount: MountSpec) -> None:
    """Show `source`, with all that is mounted below it, at `target`: without devices and setuid programs and, where
    asked, without writing, from the first moment on."""
    opened: list[int] = []
    try:
        opened.append(source := os.open(mount.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if str(Path(f"/proc/self/fd/{source}").readlink()) != mount.source:  # a link since the runner looked
            raise Refused(f"{mount.source} was replaced by a link while it was mounted")
        opened.append(target := _open_target(mount.target, may_be_full=mount.target == mount.source))
        opened.append(tree := _copy_tree(source))
        _restrict(tree, read_only=mount.read_only)
        flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
        _syscall("move_mount", _SYS_MOVE_MOUNT, tree, b"", target, b"", ctypes.c_uint(flags))
    finally:
        for fd in opened:
            os.close(fd)


def _copy_tree(source: int) -> int:
    """A copy of the mounts at and below `source` that is nowhere yet."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | _AT_EMPTY_PATH | os.O_CLOEXEC
    return _syscall("open_tree", _SYS_OPEN_TREE, source, b"", ctypes.c_uint(flags))


def _open_target(path: str, *, may_be_full: bool) -> int:
    """The directory, made where it is missing; no link on the way to it is followed. Raises Refused."""
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in path.strip("/").split("/"):
        try:
            below = _open_directory(name, at)
        except NotADirectoryError:
            raise Refused(f"{path} cannot be a mount target: {name!r} is a link or a file on the node") from None
        finally:
            os.close(at)
        at = below
    if not may_be_full and any(Path(f"/proc/self/fd/{at}").iterdir()):
        os.close(at)
        raise Refused(f"the mount target {path} exists on the node and is not empty")
    return at


def _open_directory(name: str, at: int) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=at)
        return os.open(name, flags, dir_fd=at)


def _restrict(tree: int, *, read_only: bool) -> None:
    attributes = _MountAttr(attr_set=_ATTR_NOSUID | _ATTR_NODEV | (_ATTR_RDONLY if read_only else 0))
    flags, size = ctypes.c_uint(_AT_RECURSIVE | _AT_EMPTY_PATH), ctypes.c_size_t(ctypes.sizeof(attributes))
    _syscall("mount_setattr", _SYS_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(attributes), size)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    done = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(done, f"mount {target}")


def _syscall(name: str, number: int, *arguments: Any) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    _check(result, name)
    return result


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    try:
        leave_the_nodes(1 << 20)
        os.close(_copy_tree(os.open(_SHM, os.O_PATH | os.O_DIRECTORY)))
    except OSError as error:
        sys.exit(error.strerror)


if __name__ == "__main__":
    main()
