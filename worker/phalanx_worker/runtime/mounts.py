"""Mounts that only one group sees: its guardian leaves the node's mount table for a copy of its own.

Owns the calls to the kernel (unshare, mount, open_tree, mount_setattr, move_mount) and the care against links that
somebody puts in the way. What may be mounted has been decided before (`node/mounts.py`).
`python -m phalanx_worker.runtime.mounts` tells whether this node lets us: it ends with the reason, or with nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

from phalanx_worker.runtime import linux
from phalanx_worker.runtime.spec import GroupSpec, MountSpec

_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE, _MS_SLAVE = 2, 4, 16384, 1 << 18, 1 << 19
_MNT_DETACH = 2
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
            _bind(mount, group.uid)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            reason = f"{where}{error.strerror}"
            raise Refused(f"{mount.source} cannot be mounted on {mount.target}: {reason}") from error


def give_shm_back(group: GroupSpec) -> None:
    """What lies in the group's own /dev/shm would else stay for as long as this process."""
    if group.private:
        _libc.umount2(_SHM.encode(), _MNT_DETACH)


def leave_the_nodes(shm_bytes: int) -> None:
    """An own copy of the mount table, of which nothing gets out, and an own, empty /dev/shm; System V's memory too.
    What the node mounts or unmounts later gets in: it may mount on demand, and must get rid of what it unmounts."""
    size_bytes = shm_bytes or _size_bytes(_SHM)
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    _mount("tmpfs", _SHM, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={size_bytes}")


def _size_bytes(path: str) -> int:
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _bind(mount: MountSpec, uid: int | None) -> None:
    """Show `source`, with all that is mounted below it now, at `target`: without devices and setuid programs and, where
    asked, without writing, from the first moment on."""
    opened: list[int] = []
    try:
        opened.append(source := os.open(mount.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if str(Path(f"/proc/self/fd/{source}").readlink()) != mount.source:  # a link since the runner looked
            raise Refused(f"{mount.source} was replaced by a link while it was mounted")
        opened.append(target := _open_target(mount.target, uid, may_be_full=mount.target == mount.source))
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


def _open_target(path: str, uid: int | None, *, may_be_full: bool) -> int:
    """The directory, made where it is missing; no link on the way to it is followed. Raises Refused.

    A directory right below / is made for anybody, others by the ranks' user: root would make them among others' files.
    """
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    names = path.strip("/").split("/")
    for name in names:
        try:
            below = _open_directory(name, at, None if len(names) == 1 else uid)
        except PermissionError:
            said = f"the mount target {path} does not exist on the node, and the job's user may not make it"
            raise Refused(f"{said}; choose one right below /, such as /data") from None
        except NotADirectoryError:
            raise Refused(f"{path} cannot be a mount target: {name!r} is a link or a file on the node") from None
        finally:
            os.close(at)
        at = below
    if not may_be_full and any(Path(f"/proc/self/fd/{at}").iterdir()):
        os.close(at)
        raise Refused(f"the mount target {path} exists on the node and is not empty")
    return at


def _open_directory(name: str, at: int, uid: int | None) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        _make_directory(name, at, uid)
        return os.open(name, flags, dir_fd=at)


def _make_directory(name: str, at: int, uid: int | None) -> None:
    """As that user; None: as this process's. Raises OSError."""
    if uid is None:
        with contextlib.suppress(FileExistsError):  # another group was quicker
            os.mkdir(name, 0o755, dir_fd=at)
        return
    pid = os.fork()
    if pid == 0:
        code = errno.EPERM
        try:
            linux.become_user(uid)
            _make_directory(name, at, None)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        number = code if code > 0 else errno.EPERM
        raise OSError(number, os.strerror(number), name)


def _restrict(tree: int, *, read_only: bool) -> None:
    """And cut off: what the node mounts below the source later would be neither."""
    attr_set = _ATTR_NOSUID | _ATTR_NODEV | (_ATTR_RDONLY if read_only else 0)
    attributes = _MountAttr(attr_set=attr_set, propagation=_MS_PRIVATE)
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
        _restrict(_copy_tree(os.open(_SHM, os.O_PATH | os.O_DIRECTORY)), read_only=True)
    except OSError as error:
        sys.exit(error.strerror)


if __name__ == "__main__":
    main()
