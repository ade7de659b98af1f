"""A rank from fork to user code: its session, user, signals, environment, directory and streams.

Owns everything between `fork` in the guardian and the first line of the user's program. Never returns, never raises
into the guardian: what goes wrong is written to the rank's stderr and becomes exit code 126 or 127, as in a shell.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from phalanx_worker.runtime import confine, linux, marks, process_groups, script, venv
from phalanx_worker.runtime.spec import GroupSpec, RankSpec

_REPORT_FD_FROM = 64  # above what shell scripts use by number


@dataclass(frozen=True)
class RankFds:
    stdout: int
    stderr: int
    report: int


def enter(
    group: GroupSpec, rank: RankSpec, fds: RankFds, *, guardian_pid: int, own_fds: list[int], startup: frozenset[str]
) -> NoReturn:
    """Become the rank. `own_fds` are the guardian's, to be closed; `startup` names the interpreter's own modules."""
    try:
        os.setsid()
        os.dup2(fds.stderr, 2)
        linux.go_first_when_memory_ends()
        confine.enter(group.cgroup, group.cores)
        if group.uid is None:
            linux.be_readable()  # for the runner, who is the same user; other tenants are where nodes are shared so
        else:
            linux.become_user(group.uid)
        linux.die_with_parent(guardian_pid)
        _reset_signals()
        os.umask(0o022)
        report_fd = _arrange_fds(fds, own_fds)
        _replace_environment({**group.env, **rank.env, "PHALANX_REPORT_FD": str(report_fd)})
        os.chdir(group.cwd)
        if group.preflight_factor:
            _look_at_nodes(group)
        if group.program.kind == "exec":
            _execute(group.program.argv)
        if group.venv:
            venv.enter(group.venv)
        _become_fresh_python(group)
        _run(group, startup)
    except BaseException as error:
        os.write(2, f"phalanx: could not start: {error}\n{traceback.format_exc()}".encode())
    os._exit(126)


def _look_at_nodes(group: GroupSpec) -> None:
    """The preflight, in a child: what it leaves in a process is nothing for the program. Does not return where a node
    of the gang is unfit."""
    rank_pid = os.getpid()
    child = os.fork()
    if not child:
        code = 1
        try:
            linux.die_with_parent(rank_pid)
            loaded: dict[str, Any] = dict(sys.modules)
            if torch := loaded.get("torch"):
                torch.set_num_threads(group.threads)
            from phalanx_worker.training import preflight  # imports torch, which a rank without preflight may not need

            process_groups.install()
            code = preflight.run(group.preflight_factor)
        except BaseException as error:
            os.write(2, f"phalanx: the preflight failed: {error}\n{traceback.format_exc()}".encode())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        os._exit(1)


def _run(group: GroupSpec, startup: frozenset[str]) -> NoReturn:
    name, *arguments = group.program.argv
    sys.orig_argv = [group.program.name, *(["-m"] if group.program.kind == "module" else []), name, *arguments]
    start = script.run_module if group.program.kind == "module" else script.run_script
    start(name, arguments, keep_modules=startup)


def _execute(argv: list[str]) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two; a program must not inherit that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except FileNotFoundError:
        os.write(2, f"phalanx: {argv[0]}: command not found\n".encode())
        os._exit(127)
    except OSError as error:
        os.write(2, f"phalanx: {argv[0]}: {error.strerror}\n".encode())
        os._exit(126)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _arrange_fds(fds: RankFds, own_fds: list[int]) -> int:
    """stdin from nowhere, stdout and stderr into the pipes, the report socket out of the way; all else closed."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fds.stdout, 1)
    report = fcntl.fcntl(fds.report, fcntl.F_DUPFD, _REPORT_FD_FROM)  # inheritable, unlike the original
    for fd in {null, fds.stdout, fds.stderr, fds.report, *own_fds}:
        if fd > 2:
            os.close(fd)
    return report


def _replace_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _become_fresh_python(group: GroupSpec) -> None:
    """Undo what the warm process settled at import and a fresh interpreter would settle from its own surroundings."""
    loaded: dict[str, Any] = dict(sys.modules)
    time.tzset()
    random.seed()
    if numpy_random := loaded.get("numpy.random"):
        numpy_random.seed()
    if tempfile := loaded.get("tempfile"):
        tempfile.tempdir = None
    if process := loaded.get("multiprocessing.process"):
        process.ORIGINAL_DIR = group.cwd
        process.current_process().authkey = os.urandom(32)
    if group.unbuffered:
        loaded["sys"].stdout.reconfigure(line_buffering=True)  # so that logs are live
    if torch := loaded.get("torch"):
        torch.default_generator.seed()
        torch.set_num_threads(group.threads)
    marks.install()
    process_groups.install()
