"""Does the memory of each process stay flat? Thousands of short jobs through a whole `phalanx up`, end to end.

    python benchmarks/soak.py [--jobs N]

Real server, scheduler, agent, Ray, runners and PostgreSQL. Prints the resident memory of each kind of process five
times on the way, and how it grew after the second time: until then caches fill.
"""

import argparse
import os
import time
from collections import Counter
from itertools import islice

import measure
import phalanx
import psutil

BATCH_JOBS = 200
BEHIND_MAX_JOBS = 400  # submitted and not over: enough to keep every GPU busy
SAMPLES = 5
MIB = 1 << 20


def kind_of(process: psutil.Process) -> str | None:
    """What a process of Phalanx is; None for one that comes and goes."""
    try:
        words, name = process.cmdline(), process.name()
    except psutil.Error:
        return None
    line = " ".join(words)
    if "phalanx_worker.runtime.boot" in line:
        return "warm process"
    if "NodeRunner" in line:
        return "node runner"
    if "-m phalanx" in line:
        return words[words.index("phalanx") + 1]
    return name if name in ("raylet", "gcs_server") else None


def resident() -> Counter[str]:
    """Bytes of the largest process of each kind below the `phalanx up` that runs this."""
    sizes: Counter[str] = Counter()
    for process in psutil.Process(os.getppid()).children(recursive=True):
        kind = kind_of(process)
        if kind:
            try:
                sizes[kind] = max(sizes[kind], process.memory_info().rss)
            except psutil.Error:
                continue
    return sizes


def waiting(client: phalanx.Client) -> int:
    """Jobs that are not over."""
    live = client.jobs(state=["queued", "starting", "running", "stopping"])
    return sum(1 for _ in islice(live, BEHIND_MAX_JOBS))


def drive(client: phalanx.Client, jobs: int) -> list[Counter[str]]:
    """Run so many jobs; the memory after each fifth of them."""
    samples = []
    job = {"name": "short", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}}
    began = time.monotonic()
    for submitted in range(0, jobs, BATCH_JOBS):
        while waiting(client) > BEHIND_MAX_JOBS - BATCH_JOBS:
            time.sleep(0.5)
        client.submit_many([job] * BATCH_JOBS)
        if (submitted + BATCH_JOBS) * SAMPLES // jobs > len(samples):
            samples.append(resident())
            print(
                f"{submitted + BATCH_JOBS:6d} jobs, {(submitted + BATCH_JOBS) / (time.monotonic() - began):.0f}/s",
                flush=True,
            )
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    jobs = parser.parse_args().jobs
    with phalanx.Client() as client:
        samples = drive(client, jobs)
    kinds = sorted(set.intersection(*(set(sample) for sample in samples)))
    rows = [
        [
            kind,
            *(f"{sample[kind] / MIB:,.1f}" for sample in samples),
            f"{samples[-1][kind] / samples[1][kind] - 1:+.1%}",
        ]
        for kind in kinds
    ]
    columns = ["MiB", *(f"{jobs * (index + 1) // SAMPLES:,}" for index in range(SAMPLES)), "growth"]
    measure.show(f"resident memory during {jobs:,} jobs", columns, rows)


if __name__ == "__main__":
    measure.inside(main, nodes=2, gpus_per_node=8)
