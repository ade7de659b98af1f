"""What the benchmarks share: a Phalanx of their own, jobs followed to their end, torchrun beside them, tables.

A benchmark calls `inside(main)`: outside of a Phalanx it starts one in a temporary directory and runs itself there. One
that measures peers as well runs a Phalanx for a part of its time: `with phalanx_up(…)`.
"""

import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import phalanx
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SCRIPT = HERE / "ddp_steps.py"


def inside(main: Callable[[], None], *, nodes: int = 2, gpus_per_node: int = 2) -> None:
    """Run `main` with PHALANX_URL set, in a `phalanx up` of its own where there is none."""
    if "PHALANX_URL" in os.environ or {"-h", "--help"} & set(sys.argv):
        main()
        return
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as data:
        up = [sys.executable, "-m", "phalanx", "up", "--data", data, "--port", "0"]
        size = ["--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node)]
        raise SystemExit(subprocess.run([*up, *size, "--", sys.executable, *sys.argv]).returncode)


@dataclass(frozen=True)
class Phalanx:
    """A running one, and how to speak to it; `pid`: its `phalanx up`."""

    client: phalanx.Client
    token: str
    pid: int


@contextmanager
def phalanx_up(*, nodes: int, gpus_per_node: int) -> Iterator[Phalanx]:
    """A `phalanx up` of its own, warm on every node, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as data:
        argv = [sys.executable, "-m", "phalanx", "up", "--data", data, "--port", "0"]
        argv += ["--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node)]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PHALANX_"))}
        with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as up:
            try:
                while not (Path(data) / "url").exists():
                    if up.poll() is not None:
                        raise RuntimeError(f"phalanx up ended: {up.stderr.read() if up.stderr else ''}")
                    time.sleep(0.1)
                url, token = ((Path(data) / name).read_text().strip() for name in ("url", "admin-token"))
                with phalanx.Client(url, token) as client:
                    yield Phalanx(client, token, up.pid)
            finally:
                up.terminate()
                up.communicate()


def run_job(
    client: phalanx.Client,
    *,
    replicas: int,
    arguments: str,
    env: dict[str, str] | None = None,
    script: Path = SCRIPT,
) -> tuple[float, object, str]:
    """Run a script of this folder on `replicas` nodes × 2 ranks to its end: (time of the POST, job, its output)."""
    spec = {
        "name": "bench",
        "tenant": "default",
        "resources": {"replicas": replicas, "gpus_per_replica": 2},
        "run": {"command": f"python {script.name} {arguments}", "env": env or {}},
    }
    posted = time.time()
    job = client.submit(spec, workdir=HERE)
    job = client.wait(job.id)
    if job.state != "succeeded":
        raise RuntimeError(f"{job.id} {job.state}: {job.message}")
    return posted, job, client.logs(job.id)


def run_torchrun(arguments: str, *, ranks: int, script: Path = SCRIPT) -> tuple[float, str]:
    """Such a script under plain torchrun on this host: (time of its start, its output).

    Its exit code is not looked at: with torch 2.13 a rank now and then aborts in the interpreter's finalization, after
    all that is measured has been printed. `expect` sees to it that it was.
    """
    torchrun = Path(sys.executable).with_name("torchrun")
    began = time.time()
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", str(ranks), script, *shlex.split(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return began, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def numbers(name: str, output: str) -> list[float]:
    """Every `name X` line of `output`."""
    return [float(value) for value in re.findall(rf"^{name} (\S+)$", output, re.MULTILINE)]


def expect(values: list[float], count: int, output: str) -> list[float]:
    """`values`, if there are `count` of them; else RuntimeError with the output that lacks them."""
    if len(values) != count:
        raise RuntimeError(f"expected {count} figures, got {len(values)}:\n{output}")
    return values


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    print(f"  load average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} cores")
