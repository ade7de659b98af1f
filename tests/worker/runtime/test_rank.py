"""What a rank asks of the kernel before its program begins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ANY = 2**64 - 1  # PR_SET_PTRACER_ANY: every process that may read this one without Yama
BEGIN = """
import ctypes, errno, os, sys
from phalanx_worker.runtime import linux, rank
from phalanx_worker.runtime.spec import GroupSpec, Program, RankSpec

class WithoutYama:
    def prctl(self, option, value, *_):
        os.write(2, f"prctl({option:#x}, {value.value})\\n".encode())
        ctypes.set_errno(errno.EINVAL)
        return -1 if option == 0x59616D61 else 0

linux._libc = WithoutYama()
uid = int(sys.argv[1]) if sys.argv[1:] else None
program = Program("exec", ["/bin/echo", "ran"])
group = GroupSpec(program, env={}, cwd="/", ranks=[RankSpec(0, {})], uid=uid)
fds = rank.RankFds(stdout=os.dup(1), stderr=os.dup(2), report=os.pipe()[1])
rank.enter(group, group.ranks[0], fds, guardian_pid=os.getppid(), own_fds=[], startup=frozenset())
"""


def begun(*uid: str) -> tuple[str, list[str]]:
    """What a rank printed, which that user runs, and what it asked of prctl."""
    done = subprocess.run([sys.executable, "-c", BEGIN, *uid], capture_output=True, text=True, check=False)
    return done.stdout, done.stderr.splitlines()


def test_a_rank_of_the_runners_user_lets_its_stacks_be_read_where_yama_asks_it() -> None:
    printed, asked = begun()
    assert printed == "ran\n", "a kernel without Yama refuses, and that is nothing"
    assert f"prctl(0x59616d61, {ANY})" in asked


def test_a_rank_of_a_user_of_its_own_is_opened_to_nobody() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root changes its user")
    printed, asked = begun("65533")
    assert printed == "ran\n" and "prctl(0x4, 1)" in asked, "it has become that user"
    assert not any("0x59616d61" in each for each in asked)
