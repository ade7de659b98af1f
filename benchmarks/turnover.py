"""GPUs released → the next gang runs: a queue of gangs that each take every GPU of the cluster.

    python benchmarks/turnover.py [--quick] [--jobs 20]

Each job says the time when it starts and when it ends; the turnover is from the last process's last word to the last
process's first word of the next job, so it holds all of it: seeing the end, freeing the GPUs, deciding, starting. Of
Phalanx also the part from the recorded release to the recorded start, which the budget speaks of. Peers, in the same
run: Slurm (batch scripts that stand in the queue; the script's own start, on the first node), and two Ray actors on a
placement group that is asked for right after the release. Budget: p50 under 100 ms.
"""

import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import measure
import phalanx
import ray_jobs
import slurm
from report import Report, arguments, percentiles

NODES, GPUS_PER_NODE = 2, 2
WORK = "date +%s.%N; sleep 0.3; date +%s.%N"
Life = tuple[float, float]
"""When the last process of a gang started and ended, by its own word."""


def life(output: str, processes: int) -> Life:
    times = sorted(float(line) for line in output.split())
    measure.expect(times, 2 * processes, output)
    return times[processes - 1], times[-1]


def gaps(lives: Sequence[Life]) -> list[float]:
    """Milliseconds between each gang's end and the start of the next, whatever the order in which they ran."""
    return [1e3 * (later[0] - earlier[1]) for earlier, later in pairwise(sorted(lives))]


def ours(client: phalanx.Client, count: int) -> tuple[list[float], list[float]]:
    """(process to process, recorded release to recorded start)"""
    spec = {
        "name": "bench",
        "tenant": "default",
        "resources": {"replicas": NODES, "gpus_per_replica": GPUS_PER_NODE, "ranks_per_replica": 1},
        "run": {"command": f"sh -c '{WORK}'"},
    }
    jobs = [client.wait(job.id) for job in client.submit_many([spec] * count)]
    recorded = sorted(_recorded(job) for job in jobs)
    return gaps([life(client.logs(job.id), NODES) for job in jobs]), gaps(recorded)


def _recorded(job: Any) -> Life:
    return tuple(_unix(at) for at in (job.attempt.started_at, job.attempt.ended_at))


def _unix(at: datetime | str) -> float:
    return (datetime.fromisoformat(at) if isinstance(at, str) else at).timestamp()


def slurm_queue(cluster: slurm.Slurm, count: int) -> list[float]:
    script = cluster.script("turn.sh", WORK)
    outputs = [cluster.home / f"turn-{index}.out" for index in range(count)]
    for output in outputs:
        cluster.run("sbatch", f"-N{NODES}", f"--gres=gpu:{GPUS_PER_NODE}", f"--output={output}", script)
    cluster.wait_idle()
    return gaps([life(output.read_text(), 1) for output in outputs])


def ray_gangs(count: int) -> list[float]:
    found = []
    gang = ray_jobs.start_gang(nodes=NODES, gpus_per_node=GPUS_PER_NODE)
    for _ in range(count):
        time.sleep(0.3)
        released = time.time()
        gang.release()
        gang = ray_jobs.start_gang(nodes=NODES, gpus_per_node=GPUS_PER_NODE)
        found.append(1e3 * (gang.running_at - released))
    gang.release()
    return found


def main() -> None:
    args = arguments(__doc__, jobs=20)
    count = 8 if args.quick else args.jobs
    report = Report("GPUs released → next gang runs", "ms", higher_is_better=False)

    def note(values: list[float]) -> str:
        return f"p95 {percentiles(values, 0.95)[0]:,.0f}"

    with measure.phalanx_up(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as up:
        ours(up.client, 2)
        whole, recorded = ours(up.client, count)
    line = report.ours("Phalanx, process end → process", whole, note=note(whole))
    report.ours("Phalanx, release → running", recorded, limit=100, note=note(recorded))
    try:
        with slurm.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as cluster:
            found = slurm_queue(cluster, count)
            report.peer("Slurm", found, line, note=note(found))
    except slurm.Unavailable as why:
        report.remarks.append(f"without Slurm: {why}")
    with ray_jobs.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE):
        found = ray_gangs(max(5, count // 2))
        report.peer("Ray actors, new placement group", found, line, note=note(found))
    report.show()


if __name__ == "__main__":
    main()
