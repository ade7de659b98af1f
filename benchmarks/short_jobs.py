"""Short jobs: how many one-GPU jobs that run `true` go from submit to their end per second.

    python benchmarks/short_jobs.py [--quick] [--jobs 1000] [--ray-jobs 20]

8 clients submit one by one, on 4 emulated nodes × 8 GPUs; the clock runs from the first submit until the last job is
over. Peers, in the same run: Slurm (`sbatch` by 8 clients, on as many emulated nodes and GPUs), and Ray Jobs over its
HTTP API (fewer of them: they are slow). Budget: 100/s.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable

import load
import measure
import ray_jobs
import slurm
from report import Report, arguments

NODES, GPUS_PER_NODE, CLIENTS = 4, 8, 8
UNFINISHED = "state=queued&state=starting&state=running&state=stopping"
JOB = {
    "name": "true",
    "tenant": "default",
    "resources": {"replicas": 1, "gpus_per_replica": 1, "cpus_per_gpu": 1, "memory_per_gpu": "64MiB"},
    "run": {"command": "true"},
}


async def post_all(address: str, messages: Iterable[bytes]) -> list[dict]:
    """Send every message once, by 8 connections; the answers."""
    stream, answers = iter(messages), []

    async def client() -> None:
        async with load.Connection(address) as connection:
            for message in stream:
                answers.append(await connection.expect(message))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


async def ours(up: measure.Phalanx, count: int) -> float:
    """Jobs per second."""
    client, token = up.client, up.token
    submit = load.request("POST", "/v1/jobs", token=token, document=JOB)
    unfinished = load.request("GET", f"/v1/jobs?{UNFINISHED}&limit=1", token=token)
    began = time.perf_counter()
    answers = await post_all(client.url, itertools.repeat(submit, count))
    async with load.Connection(client.url) as connection:
        while (await connection.expect(unfinished))["items"]:  # noqa: ASYNC110 - another process ends them
            await asyncio.sleep(0.2)
    seconds = time.perf_counter() - began
    states = {client.job(job["id"]).state for job in answers[:: max(1, count // 20)]}
    if states != {"succeeded"}:
        raise RuntimeError(f"some jobs ended as {states}")
    return count / seconds


async def slurm_jobs(cluster: slurm.Slurm, count: int) -> float:
    script = cluster.script("true.sh", "true")
    began = time.perf_counter()
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await cluster.run_async("sbatch", "-n1", "--gres=gpu:1", "--output=/dev/null", script)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    while cluster.waiting_or_running():  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    return count / (time.perf_counter() - began)


async def ray_api(cluster: ray_jobs.RayCluster, count: int) -> float:
    submit = cluster.submit_request("true", entrypoint_num_gpus=1)
    began = time.perf_counter()
    names = [answer["submission_id"] for answer in await post_all(cluster.address, itertools.repeat(submit, count))]
    async with load.Connection(cluster.address) as connection:
        for name in names:
            status = load.request("GET", f"/api/jobs/{name}")
            while (await connection.expect(status))["status"] not in ray_jobs.OVER:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    return count / (time.perf_counter() - began)


def main() -> None:
    args = arguments(__doc__, jobs=1000, **{"ray-jobs": 20})
    count, rounds, ray_count = (300, 2, 10) if args.quick else (args.jobs, 3, args.ray_jobs)
    report = Report(f"short jobs end to end, {count} jobs", "jobs/s", higher_is_better=True)
    with measure.phalanx_up(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as up:
        asyncio.run(ours(up, 32))
        line = report.ours("Phalanx", [asyncio.run(ours(up, count)) for _ in range(rounds)], limit=100)
    try:
        with slurm.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as cluster:
            report.peer("Slurm", [asyncio.run(slurm_jobs(cluster, count)) for _ in range(rounds)], line)
    except slurm.Unavailable as why:
        report.remarks.append(f"without Slurm: {why}")
    with ray_jobs.cluster(nodes=NODES, gpus_per_node=GPUS_PER_NODE) as cluster:
        report.peer("Ray Jobs", [asyncio.run(ray_api(cluster, ray_count)) for _ in range(2)], line, f"{ray_count} jobs")
    report.show()


if __name__ == "__main__":
    main()
