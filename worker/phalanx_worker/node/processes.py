"""Processes of attempts as the kernel shows them: memory of a tree, and strays found by their environment or session.

Owns reading /proc for that. Decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phalanx_worker.runtime import linux

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SWEEPS = 100
_SWEEP_EVERY_S = 0.05
_PF_EXITING = 0x4  # among the flags in /proc/PID/stat; include/linux/sched.h


@dataclass(frozen=True)
class Stray:
    pid: int
    attempt_id: str
    group_rank: int


def memory_bytes(pids: Iterable[int], *, limit_bytes: int, shm_bytes: int = 0) -> int:
    """What the processes hold together, with `shm_bytes` in files that are memory. Shared pages count once per process
    until that would exceed the limit; only then the exact share is read, which is slow."""
    known = list(pids)
    total = resident_bytes(known) + shm_bytes
    if total <= limit_bytes:
        return total
    shares = [_proportional_bytes(pid) for pid in known]
    shared = sum(shm for _, shm in shares)  # of those files too, where a process has mapped them
    return sum(share for share, _ in shares) - shared + max(shared, shm_bytes)


def resident_bytes(pids: Iterable[int]) -> int:
    return sum(map(_resident_bytes, pids))


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _proportional_bytes(pid: int) -> tuple[int, int]:
    """Its share of the pages that it holds with others; and how much of that is shared memory."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            shares = {name: size for name, _, size in (line.partition(":") for line in file)}
    except OSError:
        return _resident_bytes(pid), 0
    share, shared = (int(shares.get(name, "0").split()[0]) * 1024 for name in ("Pss", "Pss_Shmem"))
    return share, shared


def is_dying(pid: int) -> bool:
    """Gone, a zombie, or on its way there: a process gives its memory back, and holds none, before it is a zombie."""
    fields = linux.stat_fields(pid)
    return fields is None or fields[0] == "Z" or bool(int(fields[6]) & _PF_EXITING)


def in_sessions(session_ids: set[int]) -> list[int]:
    """Every process whose session is one of these."""
    return [pid for pid in linux.pids() if (fields := linux.stat_fields(pid)) and int(fields[3]) in session_ids]


def sweep(attempt_id: str, group_rank: int, session_ids: set[int]) -> None:
    """End every process that was started with the environment of that group, or is in one of these sessions."""
    for _ in range(_SWEEPS):
        strays = [each.pid for each in strays_of(attempt_id, group_rank)]
        if not (found := {*strays, *in_sessions(session_ids)}):
            return
        kill(found)
        time.sleep(_SWEEP_EVERY_S)


def strays_of(attempt_id: str, group_rank: int) -> list[Stray]:
    return [each for each in strays() if (each.attempt_id, each.group_rank) == (attempt_id, group_rank)]


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def strays() -> list[Stray]:
    """Every process that was started with an attempt's environment."""
    found = []
    for pid in linux.pids():
        env = _environment(pid)
        if b"PHALANX_ATTEMPT_ID" in env and env.get(b"GROUP_RANK", b"").isdigit():
            attempt_id = env[b"PHALANX_ATTEMPT_ID"].decode(errors="replace")
            found.append(Stray(pid, attempt_id, int(env[b"GROUP_RANK"])))
    return found


def _environment(pid: int) -> dict[bytes, bytes]:
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return {name: value for name, _, value in (item.partition(b"=") for item in data.split(b"\0"))}
