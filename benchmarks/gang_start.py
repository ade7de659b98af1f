"""Submit → a gang of 2 nodes runs, no torch: from the POST until the last process of the gang says what time it is.

    python benchmarks/gang_start.py [--quick] [--runs 30]

Ours, on `phalanx up` with 2 emulated nodes and free GPUs: a plain command (`date`, started cold) and a Python script
(forked from the warm process). Peers, in the same run and on as many emulated nodes: `srun -N2 date`, `sbatch` of a
script that does so, and two Ray actors on a placement group. Budget: p50 under 100 ms.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import phalanx
import ray_jobs
import slurm
from report import Line, Report, arguments, percentiles

NODES, GPUS_PER_NODE = 2, 2
DATE = "date +%s.%N"
SCRIPT = "import time\nprint(time.time(), flush=True)\n"


def last(output: str, count: int) -> float:
    """The latest of the `count` times in `output`."""
    times = [float(line) for line in output.split()]
    return max(measure.expect(times, count, output))


def submitted(client: phalanx.Client, command: str, workdir: Path | None = None) -> float:
    """Seconds from the POST to the last rank's own word. One rank per node, which takes all of its GPUs."""
    spec = {
        "name": "bench",
        "tenant": "default",
        "resources": {"replicas": NODES, "gpus_per_replica": GPUS_PER_NODE, "ranks_per_replica": 1},
        "run": {"command": command},
    }
    posted = time.time()
    job = client.wait(client.submit(spec, workdir=workdir).id)
    if job.state != "succeeded":
        raise RuntimeError(f"{job.id} {job.state}: {job.message}")
    return last(client.logs(job.id), NODES) - posted


def srun(cluster: slurm.Slurm) -> float:
    began = time.time()
    out = cluster.run("srun", f"-N{NODES}", f"--gres=gpu:{GPUS_PER_NODE}", *DATE.split())
    return last(out, NODES) - began


def sbatch(cluster: slurm.Slurm) -> float:
    script, out = cluster.script("gang.sh", f"exec srun {DATE}"), cluster.home / "gang.out"
    began = time.time()
    cluster.run(
        "sbatch", f"-N{NODES}", f"--gres=gpu:{GPUS_PER_NODE}", f"--output={out}", "--open-mode=truncate", script
    )
    cluster.wait_idle()
    return last(out.read_text(), NODES) - began


def ray_gang() -> float:
    began = time.time()
    gang = ray_jobs.start_gang(nodes=NODES, gpus_per_node=GPUS_PER_NODE)
    seconds = gang.running_at - began
    gang.release()
    return seconds


def several(count: int, one: Callable[[], float], pause_s: float = 0.3) -> list[float]:
    """`count` runs in milliseconds, after two that do not count. The pause lets each system come to rest: GPUs that
    were released a moment before are another benchmark."""
    times = []
    for _ in range(2 + count):
        times.append(1e3 * one())
        time.sleep(pause_s)
    return times[2:]


def p95_note(values: list[float]) -> str:
    return f"p95 {percentiles(values, 0.95)[0]:,.0f}"


def main() -> None:
    args = arguments(__doc__, runs=30)
    runs = 10 if args.quick else args.runs
    report = Report(f"submit → gang of {NODES} nodes runs", "ms", higher_is_better=False)

    def peer(name: str, values: list[float], ours: Line) -> None:
        report.peer(name, values, ours, note=p95_note(values))

    with tempfile.TemporaryDirectory() as name, measure.phalanx_up(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as up:
        Path(name, "now.py").write_text(SCRIPT)
        cold = several(runs, lambda: submitted(up.client, DATE))
        warm = several(runs, lambda: submitted(up.client, "python now.py", Path(name)))
    ours = report.ours("Phalanx, date (cold)", cold, limit=100, note=p95_note(cold))
    report.ours("Phalanx, now.py (warm)", warm, limit=100, note=p95_note(warm))
    try:
        with slurm.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as cluster:
            peer("srun", several(runs, lambda: srun(cluster)), ours)
            peer("sbatch", several(runs, lambda: sbatch(cluster)), ours)
    except slurm.Unavailable as why:
        report.remarks.append(f"without Slurm: {why}")
    with ray_jobs.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE):
        peer("Ray actors", several(max(5, runs // 3), ray_gang, pause_s=1.5), ours)
    report.show()


if __name__ == "__main__":
    main()
