"""What a guardian is told to run: the ranks of one group, as plain data through a memory file.

Owns the form of that message, shared by the runner (writes it) and the guardian (reads it). Knows nothing of jobs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Program:
    """What a rank runs.

    kind: `script` (argv[0] is a Python file) and `module` (argv[0] is a module's name) run in the warm process's fork;
    `exec` replaces the process by argv. `name` is how the user spelled the interpreter.
    """

    kind: str
    argv: list[str]
    name: str = "python"
    shell: bool = False  # argv is our `/bin/sh -c`, or a program that need not pass signals on


@dataclass(frozen=True)
class RankSpec:
    rank: int
    env: dict[str, str]  # what differs from the group's environment


@dataclass(frozen=True)
class StoreSpec:
    host: str
    port: int
    world_size: int


@dataclass(frozen=True)
class CgroupSpec:
    """The control group of the ranks: files of it, one for each hierarchy where there are several.

    `join`: who writes 0 there is in it; `end`: what to write where, for its processes to end and to fork no more;
    `directories`: to be removed when they are empty.
    """

    join: list[str]
    end: list[tuple[str, str]]
    directories: list[str]


@dataclass(frozen=True)
class MountSpec:
    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class GroupSpec:
    program: Program
    env: dict[str, str]
    cwd: str
    ranks: list[RankSpec]
    uid: int | None = None  # None: stay the runner's user
    store: StoreSpec | None = None  # host the rendezvous on the listening socket that comes along
    threads: int = 1  # of a torch operation, where the program runs warm
    unbuffered: bool = True
    fence_s: float = 60.0  # without a ping of the runner, the guardian ends the ranks after this
    venv: str = ""  # the environment that a forked rank enters; "": it was forked in it
    straggler_s: float = 0.0  # after a clean exit, ranks that do nothing for so long are ended; 0: never
    cgroup: CgroupSpec | None = None
    cores: list[int] | None = None  # that the ranks may run on; None: all
    private: bool = False  # the ranks see mounts and a /dev/shm of their own
    mounts: list[MountSpec] = field(default_factory=list)  # where `private`
    shm_bytes: int = 0  # of their own /dev/shm; 0: as large as the node's
    preflight_factor: float = 0.0  # look at the gang's nodes first: so much worse than its peers none may be; 0: do not


def write(spec: GroupSpec) -> int:
    """Put the spec into a new memory file; the caller closes the descriptor."""
    fd = os.memfd_create("phalanx-group", os.MFD_CLOEXEC)
    data = json.dumps(dataclasses.asdict(spec)).encode()
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def read(fd: int) -> GroupSpec:
    size = os.fstat(fd).st_size
    data = json.loads(os.pread(fd, size, 0))
    store, cgroup = data.pop("store"), data.pop("cgroup")
    return GroupSpec(
        **{
            **data,
            "program": Program(**data["program"]),
            "ranks": [RankSpec(**rank) for rank in data["ranks"]],
            "store": StoreSpec(**store) if store else None,
            "cgroup": CgroupSpec(**cgroup) if cgroup else None,
            "mounts": [MountSpec(**mount) for mount in data["mounts"]],
        }
    )
