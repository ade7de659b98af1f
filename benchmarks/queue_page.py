"""The queue's page of 50, with 1,000,000 jobs stored and 100,000 of them queued: over HTTP, first and later pages.

    python benchmarks/queue_page.py [--quick] [--stored 1000000] [--queued 100000]

Ours: a real server; the jobs are put in by SQL, which is not counted. Beside the queue, the list of all jobs and one
job with its place in the queue. Peer, in the same run: Slurm with as many queued jobs (elements of one array), of which
`squeue` can only give all, and slurmrestd one by its id. Budget: p99 under 25 ms.
"""

import asyncio
import time
from collections.abc import Callable

import load
import slurm
from control_plane import ControlPlane, control_plane
from report import Line, Report, arguments, percentiles

TENANTS = 20
# Ids grow with time, as those that the server makes; priorities and ages as a long queue has them.
FILL = """
INSERT INTO tenants (id, path, parent_id)
SELECT gen_random_uuid(), 'default/team' || n, (SELECT id FROM tenants WHERE path = 'default')
FROM generate_series(1, {tenants}) AS n;
INSERT INTO jobs (id, tenant_id, name, state, priority, spec, labels, created_by, received_at, submitted_at, queued_at,
                  finished_at)
SELECT CAST(lpad(to_hex(1700000000000 + n), 12, '0') || '7000' || 'a000' || lpad(to_hex(n), 12, '0') AS uuid),
       t.ids[1 + n % {tenants}], 'train-' || n % 500,
       CASE WHEN n > {stored} - {queued} THEN 'queued' ELSE 'succeeded' END, (n % 3 - 1) * 10,
       CAST('{spec}' AS jsonb), jsonb_build_object('team', 'team' || n % {tenants}), 'bench', at, at, at,
       CASE WHEN n > {stored} - {queued} THEN NULL ELSE at + interval '1 hour' END
FROM generate_series(1, {stored}) AS n,
     LATERAL (SELECT now() - ({stored} - n) * interval '1 second' AS at) times,
     (SELECT array_agg(id ORDER BY path) AS ids FROM tenants WHERE path LIKE 'default/%') t;
INSERT INTO holds (job_id, reason, message, unblocks, estimated_start, since)
SELECT id, 'insufficient_gpus', 'Needs 16 GPUs on 2 nodes; 3 are free.', '["16 GPUs are released"]',
       now() + interval '1 hour', submitted_at
FROM jobs WHERE state = 'queued';
"""
SPEC = """{"name": "train", "tenant": "default", "resources": {"replicas": 2, "gpus_per_replica": 8,
"cpus_per_replica": 64, "memory_per_replica": 549755813888, "gpu_types": ["h100"]}, "run": {"command":
"python train.py --lr 3e-4", "env": {}, "secrets": []}, "time_limit": 14400, "retries": {"max": 3, "backoff": 30},
"preemption": {"preemptible": true, "grace": 120, "min_runtime": 600}, "labels": {}}"""
PAGES = 20


async def fill(plane: ControlPlane, stored: int, queued: int) -> None:
    connection = await plane.connect()
    try:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute(FILL.format(stored=stored, queued=queued, tenants=TENANTS, spec=SPEC), timeout=600)
        await connection.execute("VACUUM ANALYZE", timeout=600)
        await connection.execute("CHECKPOINT", timeout=600)
    finally:
        await connection.close()


async def timed(connection: load.Connection, message: bytes) -> tuple[float, dict]:
    began = time.perf_counter()
    answer = await connection.expect(message)
    return 1e3 * (time.perf_counter() - began), answer


async def measure_pages(plane: ControlPlane, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each request, by what was asked for."""
    found: dict[str, list[float]] = {}

    async with load.Connection(plane.url) as connection:

        async def ask(what: str, path: str) -> dict:
            elapsed_ms, answer = await timed(connection, load.request("GET", path, token=plane.token))
            found.setdefault(what, []).append(elapsed_ms)
            return answer

        lists = {
            "queue": "/v1/queue?limit=50",
            "jobs": "/v1/jobs?limit=50",
            "queued jobs": "/v1/jobs?state=queued&limit=50",
        }
        for path in lists.values():
            for _ in range(5):
                await timed(connection, load.request("GET", path, token=plane.token))
        for what, path in lists.items():
            for _ in range(runs):
                answer = await ask(f"{what}, first page", path)
            for _ in range(runs // PAGES):
                for _ in range(PAGES):
                    answer = await ask(f"{what}, next page", f"{path}&cursor={answer['next_cursor']}")
        for item in answer["items"][:runs]:
            await ask("one job, with its place", f"/v1/jobs/{item['id']}")
    return found


def squeue(cluster: slurm.Slurm, runs: int) -> list[float]:
    return [clocked(lambda: cluster.run("squeue", "--array", "--noheader")) for _ in range(runs)]


def clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


async def slurm_job(cluster: slurm.Slurm, job_id: str, runs: int) -> list[float]:
    message = load.request("GET", f"/slurm/v0.0.38/job/{job_id}")
    async with load.Connection(cluster.rest_address) as connection:
        return [(await timed(connection, message))[0] for _ in range(runs)]


def p99(values: list[float]) -> float:
    return percentiles(values, 0.99)[0]


def peers(report: Report, first_page: Line, one_job: Line, queued: int, runs: int) -> None:
    with slurm.cluster(nodes=1, gpus_per_node=1) as cluster:
        script = cluster.script("true.sh", "true")
        cluster.run("sbatch", "--hold", f"--array=1-{queued}", "--output=/dev/null", script)
        times = squeue(cluster, max(3, runs // 100))
        report.peer(f"squeue, all {queued:,}", times, first_page)
        one = cluster.run("sbatch", "--hold", "--output=/dev/null", script)
        times = asyncio.run(slurm_job(cluster, one.split()[-1], runs // 4))
        report.peer("slurmrestd, one job", times, one_job, note=f"p99 {p99(times):.1f}")


def main() -> None:
    args = arguments(__doc__, stored=1_000_000, queued=100_000)
    runs = 100 if args.quick else 1_000
    title = f"pages of 50, {args.stored:,} jobs stored, {args.queued:,} queued: p50, and p99 beside the budget"
    report = Report(title, "ms", higher_is_better=False)
    with control_plane(scheduler=False) as plane:
        asyncio.run(fill(plane, args.stored, args.queued))
        found = asyncio.run(measure_pages(plane, runs))
    lines = {}
    for what, times in found.items():
        lines[what] = report.ours(f"Phalanx, {what}", times, note=f"p99 {p99(times):.1f}")
    worst = p99(found["queue, first page"] + found["queue, next page"])
    report.ours("Phalanx, queue, p99", [worst], limit=25)
    try:
        peers(report, lines["queue, first page"], lines["one job, with its place"], args.queued, runs)
    except slurm.Unavailable as why:
        report.remarks.append(f"without Slurm: {why}")
    report.show()


if __name__ == "__main__":
    main()
