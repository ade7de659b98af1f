"""Lets one unprivileged Unix user reach a directory, without opening the way to anybody else.

Owns POSIX access control lists on the directories above a path (format: Linux, `linux/posix_acl_xattr.h`). PostgreSQL
refuses to run as root, so as root it runs as a user of its own, who must be able to pass through the directories above
its data and its program. Widening their mode would open a 0700 home directory to all users; an ACL entry for that one
user, with search permission only, does not.
"""

import errno
import os
import struct
from pathlib import Path

ACL_XATTR = "system.posix_acl_access"
_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
SEARCH = 1

Entry = tuple[int, int, int]  # tag, permissions, id


def let_pass(path: Path, uid: int, gid: int) -> list[Path]:
    """Give user `uid` search permission on `path` and on every directory above it where it has none.

    Returns the directories that were changed. PermissionError where the file system has no ACLs.
    """
    changed = []
    for directory in [path, *path.parents]:
        if not may_search(directory, uid, gid):
            _grant_search(directory, uid)
            changed.append(directory)
    return changed


def may_search(directory: Path, uid: int, gid: int) -> bool:
    """Whether user `uid` in group `gid` and no other may pass through `directory`, by the rules of acl(5)."""
    status = directory.stat()
    if status.st_uid == uid:
        return bool(status.st_mode & 0o100)
    entries = _read(directory)
    mask = next((permissions for tag, permissions, _ in entries if tag == _MASK), 7)
    for tag, permissions, who in entries:
        if tag == _USER and who == uid:
            return bool(permissions & mask & SEARCH)
    groups = [
        (status.st_gid if tag == _GROUP_OBJ else who, p) for tag, p, who in entries if tag in (_GROUP_OBJ, _GROUP)
    ]
    ours = [permissions for who, permissions in groups if who == gid]
    if ours:
        return any(permissions & mask & SEARCH for permissions in ours)
    return any(tag == _OTHER and permissions & SEARCH for tag, permissions, _ in entries)


def _grant_search(directory: Path, uid: int) -> None:
    entries = [entry for entry in _read(directory) if entry[0] != _MASK and entry[::2] != (_USER, uid)]
    old_mask = [entry for entry in _read(directory) if entry[0] == _MASK]
    group = next(permissions for tag, permissions, _ in entries if tag == _GROUP_OBJ)
    mask = (old_mask[0][1] if old_mask else group) | SEARCH
    entries += [(_USER, SEARCH, uid), (_MASK, mask, _NO_ID)]
    try:
        os.setxattr(directory, ACL_XATTR, _pack(entries))
    except OSError as error:
        raise PermissionError(
            error.errno, f"user {uid} may not pass through it, and it takes no ACL", str(directory)
        ) from error


def _read(directory: Path) -> list[Entry]:
    """The ACL of `directory`; where it has none, the one that its mode means."""
    try:
        packed = os.getxattr(directory, ACL_XATTR)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
        mode = directory.stat().st_mode
        return [(_USER_OBJ, mode >> 6 & 7, _NO_ID), (_GROUP_OBJ, mode >> 3 & 7, _NO_ID), (_OTHER, mode & 7, _NO_ID)]
    return list(struct.iter_unpack("<HHI", packed[4:]))


def _pack(entries: list[Entry]) -> bytes:
    ordered = sorted(entries, key=lambda entry: (entry[0], entry[2]))
    return struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in ordered)
