"""The parent of one environment's build, and the build itself up to pip.

Owns the certainty that a build leaves no process: it adopts orphans, and kills everything below it when pip has ended
or when its own stdin closes, which it does when the runner dies. Building runs code of packages, so it runs as the
tenant's user where tenants have one. Started by the node's own Python as
`python -m phalanx_worker.runtime.builder DIRECTORY UID CGROUP` (UID -1: stay this user; CGROUP: a `CgroupSpec` as JSON)
with the environment's lines in `DIRECTORY/requirements.txt`; ends with pip's exit code, or 128 + the signal that ended
it. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
import venv as standard_venv
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from phalanx_worker.runtime import confine, linux, venv
from phalanx_worker.runtime.spec import CgroupSpec

BROKEN = 70  # exit code: it failed before pip, which is no fault of the requirements
_NICENESS = 10  # ranks of others train beside it
_LOOK_EVERY_MS = 50
_KILL_AGAIN_S = 0.02
_SCRIPT = """#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys
from {module} import {name}
sys.exit({attribute}())
"""


def main(directory: str, uid: int, cgroup: CgroupSpec) -> int:
    linux.adopt_orphans()
    parent_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _build(directory, uid, parent_pid, cgroup)
    status = _follow(pid)
    while not _reap():
        confine.end(cgroup)
        for each in linux.descendants(parent_pid):
            _kill(each)
        time.sleep(_KILL_AGAIN_S)
    confine.remove(cgroup)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _follow(pid: int) -> int:
    """Until the build has ended, or is given up; its wait status."""
    lifeline = select.poll()
    lifeline.register(0, select.POLLIN | select.POLLHUP)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if lifeline.poll(_LOOK_EVERY_MS):
            return signal.SIGKILL


def _reap() -> bool:
    """Collect what ended; True when no child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------ in the child


def _build(directory: str, uid: int, parent_pid: int, cgroup: CgroupSpec) -> NoReturn:
    """Become pip. Never returns, never raises."""
    try:
        os.setsid()
        linux.go_first_when_memory_ends()
        confine.enter(cgroup, None)
        if uid >= 0:
            linux.become_user(uid)
        linux.die_with_parent(parent_pid)
        os.umask(0o022)
        os.nice(_NICENESS)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.chdir(directory)
        target = f"{directory}/venv"
        standard_venv.EnvBuilder(symlinks=True, with_pip=False).create(target)
        venv.add_base(target)
        _add_scripts(target)
        _become_pip(f"{target}/bin/python", f"{directory}/requirements.txt")
    except BaseException:
        traceback.print_exc()
    os._exit(BROKEN)


def _become_pip(python: str, requirements: str) -> NoReturn:
    options = ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--no-color", "--progress-bar", "off"]
    os.execv(python, [python, "-m", "pip", "install", *options, "-r", requirements])


def _add_scripts(target: str) -> None:
    """`pip`, `torchrun` and the like for this environment: those of the node's Python would run without it."""
    python = f"{target}/bin/python"
    for entry in metadata.entry_points(group="console_scripts"):
        path = Path(target, "bin", entry.name)
        if entry.attr and not path.exists():
            name = entry.attr.partition(".")[0]
            path.write_text(_SCRIPT.format(python=python, module=entry.module, name=name, attribute=entry.attr))
            path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), CgroupSpec(**json.loads(sys.argv[3]))))
