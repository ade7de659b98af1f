"""The capabilities that worker Pods get are those that the node runner needs: with them it works, with one less it
does not. Under the kernel's own rules, for which this has to be root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_chart import WORKER_CAPABILITIES

TENANT_UID = 71_000

# What the runner does as root with what belongs to a tenant's user; see worker/phalanx_worker/node and runtime/linux.
DUTIES = """
import os, shutil, signal, sys
from pathlib import Path
from phalanx_worker.node import processes
from phalanx_worker.runtime import linux

root, uid = Path(sys.argv[1]), int(sys.argv[2])
work = root / "work"
work.mkdir(mode=0o700)
os.chown(work, uid, uid)
(work / "code.py").write_text("")
os.lchown(work / "code.py", uid, uid)

runs, started = os.pipe()  # closed by the rank's exec, after which its environment can be read
rank = os.fork()
if rank == 0:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        linux.become_user(uid)
        (work / "shared").mkdir()
        (work / "shared" / "file").write_text("")
        (work / "shared").chmod(0o1777)
        os.execve("/bin/sleep", ["sleep", "3"], {"PHALANX_ATTEMPT_ID": "a", "GROUP_RANK": "0"})
    finally:
        os._exit(9)

os.close(started)
os.read(runs, 1)
found = any(stray.pid == rank for stray in processes.strays())
killed = False
if found:
    processes.kill([rank])
    killed = os.waitpid(rank, 0)[1] == signal.SIGKILL
shutil.rmtree(work, ignore_errors=True)
sys.exit(0 if (found, killed, work.exists()) == (True, True, False) else f"{found=} {killed=} {work.exists()=}")
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and util-linux's setpriv"
)


def carry_out(directory: Path, capabilities: list[str]) -> subprocess.CompletedProcess[str]:
    bounding = ",".join(["-all", *(f"+{capability.lower()}" for capability in capabilities)])
    command = ["setpriv", "--no-new-privs", f"--bounding-set={bounding}", "--pdeathsig=KILL"]
    command += [sys.executable, "-c", DUTIES, str(directory), str(TENANT_UID)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not pytest's own, which other users cannot enter."""
    path = Path(tempfile.mkdtemp(prefix="phx-cap-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_the_charts_capabilities_are_enough(directory: Path) -> None:
    done = carry_out(directory, WORKER_CAPABILITIES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", WORKER_CAPABILITIES)
def test_none_of_them_is_too_many(directory: Path, missing: str) -> None:
    done = carry_out(directory, [capability for capability in WORKER_CAPABILITIES if capability != missing])
    assert done.returncode != 0
