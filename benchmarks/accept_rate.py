"""Accepting jobs: submits per second over HTTP, one by one and in batches, and how long one takes.

    python benchmarks/accept_rate.py [--quick] [--clients 8]

Ours: real server and scheduler processes, every answer after a commit on disk. No node takes work, so that jobs only
queue. Peers, in the same run: Slurm over its REST API and by `sbatch` (jobs on hold; it acknowledges from memory), and
the Ray Jobs API (its jobs ask for GPUs that are not there). Budgets: 1,000/s by 8 clients, 10,000/s in batches, p99 of
a submit under 50 ms.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator

import load
import ray_jobs
import slurm
from control_plane import ControlPlane, control_plane
from report import Line, Report, arguments, percentiles

JOB = {
    "name": "bench",
    "tenant": "default",
    "resources": {"replicas": 2, "gpus_per_replica": 8},
    "run": {"command": "python train.py --lr 3e-4"},
    "time_limit": "4h",
    "labels": {"team": "nlp"},
}
BATCH, BATCH_CLIENTS = 500, 4


def rounds(count: int, one: Callable[[], load.Round]) -> list[load.Round]:
    return [one() for _ in range(count)]


def singles(plane: ControlPlane, clients: int, seconds: float) -> load.Round:
    message = load.request("POST", "/v1/jobs", token=plane.token, document=JOB)
    return asyncio.run(load.post_for(plane.url, clients, seconds, lambda _: itertools.repeat(message)))


def batches(plane: ControlPlane, seconds: float) -> load.Round:
    message = load.request("POST", "/v1/jobs/batch", token=plane.token, document={"jobs": [JOB] * BATCH})
    return asyncio.run(load.post_for(plane.url, BATCH_CLIENTS, seconds, lambda _: itertools.repeat(message)))


def slurm_rest(cluster: slurm.Slurm, clients: int, seconds: float) -> load.Round:
    message = cluster.rest_request("true", hold=True)
    return asyncio.run(load.post_for(cluster.rest_address, clients, seconds, lambda _: itertools.repeat(message)))


def sbatch(cluster: slurm.Slurm, clients: int, seconds: float) -> load.Round:
    script = cluster.script("true.sh", "true")

    async def make(_: int) -> Callable[[], Awaitable[str]]:
        return lambda: cluster.run_async("sbatch", "--hold", "--output=/dev/null", script)

    return asyncio.run(load.drive(clients, seconds, make))


def ray_api(cluster: ray_jobs.RayCluster, clients: int, seconds: float) -> load.Round:
    def messages(_: int) -> Iterator[bytes]:
        return itertools.repeat(cluster.submit_request("true", entrypoint_num_gpus=64))

    return asyncio.run(load.post_for(cluster.address, clients, seconds, messages))


def latency_lines(report: Report, name: str, done: list[load.Round], against: list[Line] | None = None) -> list[Line]:
    """p50 and p99 of each round, in milliseconds."""
    p50, p99 = ([1e3 * percentiles(each.latencies_s, share)[0] for each in done] for share in (0.5, 0.99))
    if against is None:
        return [report.ours(f"{name}, p50", p50), report.ours(f"{name}, p99", p99, limit=50)]
    return [
        report.peer(f"{name}, {which}", each, line)
        for which, each, line in zip(("p50", "p99"), (p50, p99), against, strict=True)
    ]


def main() -> None:
    args = arguments(__doc__, clients=8)
    count, seconds = (3, 1.0) if args.quick else (7, 3.0)
    rate = Report(f"accepted jobs, {args.clients} clients", "jobs/s", higher_is_better=True)
    latency = Report(f"one submit, {args.clients} clients", "ms", higher_is_better=False)
    with control_plane(scheduler=True) as plane:
        singles(plane, args.clients, 0.5)
        done = rounds(count, lambda: singles(plane, args.clients, seconds))
        ours = rate.ours("Phalanx", [each.rate for each in done], limit=1_000, note="durable")
        ours_latency = latency_lines(latency, "Phalanx", done)
    with control_plane(scheduler=True) as plane:
        done = rounds(count, lambda: batches(plane, seconds))
        rate.ours(f"Phalanx, {BATCH} a batch", [BATCH * each.rate for each in done], limit=10_000, note="durable")
    try:
        with slurm.cluster(nodes=2, gpus_per_node=8) as cluster:
            for name, one in (("Slurm REST", slurm_rest), ("sbatch", sbatch)):
                done = rounds(count, lambda one=one: one(cluster, args.clients, seconds))
                rate.peer(name, [each.rate for each in done], ours, note="from memory")
                latency_lines(latency, name, done, ours_latency)
    except slurm.Unavailable as why:
        rate.remarks.append(f"without Slurm: {why}")
    with ray_jobs.cluster(nodes=0, gpus_per_node=0) as cluster:
        done = rounds(count, lambda: ray_api(cluster, args.clients, seconds))
        rate.peer("Ray Jobs API", [each.rate for each in done], ours, note="from memory")
        latency_lines(latency, "Ray Jobs API", done, ours_latency)
    rate.show()
    latency.show()


if __name__ == "__main__":
    main()
