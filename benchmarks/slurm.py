"""Slurm as a peer: a private cluster on this host, in a temporary directory, for the length of a `with`.

Owns its daemons (munged, slurmctld, one slurmd per emulated node, slurmrestd) and its settings, which are chosen to be
fast: batch jobs are considered at once (`batch_sched_delay=0`), backfill runs every second, no accounting, no process
tracking by cgroups, no task plugin. GPUs are files that only count. It needs root and Debian's packages `slurm-wlm`,
`slurmrestd` and `munge`; without them `cluster` raises Unavailable, and a benchmark goes on without this peer.
"""

import asyncio
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmrestd", "sbatch", "srun", "squeue")
START_TIMEOUT_S = 30.0
SUBMIT_PATH = "/slurm/v0.0.38/job/submit"
SUBMITTED = re.compile(r"Submitted batch job (\d+)")

CONFIGURATION = """
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1
ReturnToService=2
MaxJobCount=500000
MaxArraySize=200001
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=4096 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """There can be no Slurm here; the message says why."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. Jobs are shell scripts; their output is thrown away unless `output` names a file."""

    home: Path
    env: dict[str, str]

    @property
    def rest_address(self) -> str:
        return f"unix:{self.home}/rest.socket"

    def run(self, *argv: str) -> str:
        """A command of Slurm's; its output. Raises CalledProcessError."""
        return subprocess.run(argv, env=self.env, cwd="/", check=True, capture_output=True, text=True).stdout

    async def run_async(self, *argv: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *argv, env=self.env, cwd="/", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{argv[0]} failed: {err.decode()}")
        return out.decode()

    def script(self, name: str, text: str) -> str:
        """A batch script; its path."""
        path = self.home / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        return str(path)

    def waiting_or_running(self) -> int:
        """How many jobs are not over yet."""
        return len(self.run("squeue", "--noheader", "--format=%i", "--array").split())

    def wait_idle(self, timeout_s: float = 300.0) -> None:
        _wait(lambda: self.waiting_or_running() == 0, timeout_s, "Slurm's queue")

    def rest_request(self, script: str, **job: Any) -> bytes:
        """A submit for slurmrestd."""
        given = {"nodes": 1, "tasks": 1, "current_working_directory": "/", "standard_output": "/dev/null"}
        document = {"script": f"#!/bin/sh\n{script}\n", "job": given | {"environment": {"PATH": "/usr/bin:/bin"}} | job}
        return load.request("POST", SUBMIT_PATH, document=document)


@contextmanager
def cluster(*, nodes: int, gpus_per_node: int) -> Iterator[Slurm]:
    """Run a private cluster. Raises Unavailable."""
    _expect_installed()
    with tempfile.TemporaryDirectory(prefix="slurm-bench-") as name, ExitStack() as stack:
        home = Path(name)
        home.chmod(0o755)
        _configure(home, nodes, gpus_per_node)
        slurm = Slurm(home, {"PATH": os.environ["PATH"], "SLURM_CONF": str(home / "slurm.conf"), "HOME": name})

        def start(*argv: str, **env: str) -> None:
            stack.enter_context(_daemon(home, argv, slurm.env | env))

        start("munged", "--foreground", "--force", *(f"--{what}={home}/munge.{end}" for what, end in _MUNGE_FILES))
        _wait((home / "munge.socket").exists, START_TIMEOUT_S, "munged")
        start("slurmctld", "-D", "-c")
        for node in range(1, nodes + 1):
            start("slurmd", "-D", "-N", f"n{node}")
        rest = ["slurmrestd", "-a", "rest_auth/local", "-s", "openapi/v0.0.38", slurm.rest_address]
        start(*rest, SLURMRESTD_SECURITY="disable_user_check")
        _wait(lambda: _idle_nodes(slurm) == nodes, START_TIMEOUT_S, "Slurm's nodes")
        _wait((home / "rest.socket").exists, START_TIMEOUT_S, "slurmrestd")
        yield slurm


_MUNGE_FILES = [
    ("key-file", "key"),
    ("socket", "socket"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
]


def _expect_installed() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise Unavailable(f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm slurmrestd munge")
    if os.geteuid() != 0:
        raise Unavailable("a private Slurm cluster needs root")


def _configure(home: Path, nodes: int, gpus_per_node: int) -> None:
    (home / "state").mkdir()
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for index in range(gpus_per_node):
        (home / f"gpu{index}").touch()
    for node in range(1, nodes + 1):
        (home / f"spool-n{node}").mkdir()
    port, first_port = _free_ports(1 + nodes)
    (home / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            home=home,
            port=port,
            nodes=nodes,
            gpus=gpus_per_node,
            first_port=first_port,
            last_port=first_port + nodes - 1,
        )
    )
    gpu_files = f"{home}/gpu[0-{gpus_per_node - 1}]"
    (home / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu File={gpu_files}\n")


def _free_ports(count: int) -> tuple[int, int]:
    """The first of `count` free ports in a row, and the one after it."""
    for first in range(21_000, 60_000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
                return first, first + 1
            except OSError:
                continue
    raise Unavailable(f"no {count} free ports in a row")


@contextmanager
def _daemon(home: Path, argv: tuple[str, ...], env: dict[str, str]) -> Iterator[None]:
    with (home / f"{argv[0]}.out").open("ab") as out:
        process = subprocess.Popen(argv, env=env, cwd="/", stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _idle_nodes(slurm: Slurm) -> int:
    try:
        return slurm.run("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    except subprocess.CalledProcessError:  # it does not listen yet
        return 0


def _wait(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was not ready after {timeout_s:.0f} s")
        time.sleep(0.02)
