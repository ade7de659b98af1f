"""What Linux offers beyond Python's own library: prctl, and the process table in /proc.

Owns the numbers of the kernel's interface and the reading of /proc/PID/stat. Decides nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PTRACER = 0x59616D61  # "Yama"
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the parent dies. To be called after any change of uid, which clears it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_user(uid: int) -> None:
    """Drop to an unprivileged user for good; its /proc files stay its own and no setuid program brings it back."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _prctl(_PR_SET_DUMPABLE, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def be_readable() -> None:
    """Let processes of the same user that are not above this one, such as the runner's py-spy, read its stacks, which
    Yama refuses (`ptrace_scope` = 1, as Ubuntu and Debian come). Holds through exec, and not for children."""
    with contextlib.suppress(OSError):  # EINVAL: a kernel without Yama, which asks for the same user alone
        _prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)


def go_first_when_memory_ends() -> None:
    """When the kernel must choose, this process and its children die before raylet, runner, guardian or warm process.
    To be called before any change of uid."""
    with contextlib.suppress(OSError):  # a hint only
        Path("/proc/self/oom_score_adj").write_text("1000")


def thread_count() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def holds_device(prefix: str) -> bool:
    """Whether this process has a file open whose path starts with `prefix`, such as /dev/nvidia."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            if str(entry.readlink()).startswith(prefix):
                return True
    return False


def pids() -> list[int]:
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def parents() -> dict[int, int]:
    """pid -> parent pid of every process that can be seen."""
    table = {}
    for pid in pids():
        fields = stat_fields(pid)
        if fields:
            table[pid] = int(fields[1])
    return table


def stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat after the command name: state, ppid, pgrp, session, …; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return None


def descendants(root_pid: int, table: dict[int, int] | None = None) -> list[int]:
    """Every process below `root_pid`, itself left out."""
    children: dict[int, list[int]] = {}
    for pid, parent in (parents() if table is None else table).items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = list(children.get(root_pid, ()))
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(children.get(pid, ()))
    return found


def cpu_ticks(pids: Iterable[int]) -> dict[int, int]:
    """CPU time that each process used with everything below it, in clock ticks."""
    table = parents()
    return {pid: sum(map(_own_ticks, [pid, *descendants(pid, table)])) for pid in pids}


def _own_ticks(pid: int) -> int:
    fields = stat_fields(pid)
    return sum(map(int, fields[11:15])) if fields else 0  # user and system, its own and of children it waited for


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
