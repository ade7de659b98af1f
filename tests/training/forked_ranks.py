"""Ranks that are forked from one process, so that torch and the recipes are imported once: how the gangs of these tests
are served, and asked. They run as a program of its own, and not in pytest's process, whose threads a fork would lose.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answers(program: str, cases: list[Any], *, ranks: int, timeout_s: float) -> Any:
    """What a program that serves cases prints of these, on gloo."""
    done = subprocess.run(
        [sys.executable, program, str(ranks)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def serve(run_case: Callable[[Any, Path], Any]) -> tuple[list[Any], list[list[Any]]]:
    """Run the cases (a JSON list on stdin) on so many ranks (the first argument): the cases, and of each rank what
    `run_case(case, a directory that all ranks share)` gave for each of them. Import what it needs before."""
    import torch.multiprocessing

    ranks, cases = int(sys.argv[1]), json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (ranks, cases, directory, run_case)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="fork")
        return cases, [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, cases: list[Any], directory: str, run_case: Callable[[Any, Path], Any]) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    answers = []
    for number, case in enumerate(cases):
        began = time.perf_counter()
        answers.append(run_case(case, Path(directory, str(number))))
        gc.collect()
        if rank == 0:
            print(f"case {number}: {time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)
    Path(directory, f"{rank}.json").write_text(json.dumps(answers))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread may want the lock that a reducer's end holds
