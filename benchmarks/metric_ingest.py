"""Metrics: points per second that the server takes in node reports, and how long a chart over 1,000,000 of them takes.

    python benchmarks/metric_ingest.py [--quick] [--points 1000000]

Ours: a real server; 4 played nodes report over HTTP, 250 steps × 4 values a report, each answered after its commit,
raw points and roll-ups written. A point is one value of one name. Beside it, on the same database: COPY of as many
rows into the same table, a commit per report, which keeps nothing else (a floor rather than a peer), and for the chart
the grouping of the raw points that the roll-ups save. Budgets: 20,000 points/s; a chart of any length in under 50 ms.
"""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import asyncpg
import load
import played_nodes
from control_plane import ControlPlane, control_plane
from phalanx_worker import protocol
from played_nodes import PlayedAttempt
from report import Report, arguments, percentiles

NODES, STEPS, NAMES = 4, 250, ("loss", "grad_norm", "tokens_per_s", "lr")
POINTS = STEPS * len(NAMES)
STEP_S = 0.5
BUCKETS = 500  # of a chart
WINDOWS = {"all of it": 1.0, "its last tenth": 0.1, "its last hundredth": 0.01}


def reports(attempt: PlayedAttempt, boot: str) -> Iterator[bytes]:
    """One report after another: the steps of a training that began as long ago as a step takes."""
    for seq in itertools.count(1):
        first, now = (seq - 1) * STEPS, time.time()
        points = [
            protocol.MetricPoint(
                *(attempt.id, attempt.epoch, 0, now - (STEPS - step) / 1e4, first + step),
                values=dict.fromkeys(NAMES, 1.0 / (first + step + 1)),
            )
            for step in range(STEPS)
        ]
        document = played_nodes.report_of(attempt, boot, seq, points)
        yield load.request("POST", "/v1/node/reports", token=attempt.node_token, document=document)


async def ingest(plane: ControlPlane, attempts: list[PlayedAttempt], rounds: int, seconds: float) -> list[float]:
    """Points per second of each round. Reports are made while the round runs; making one costs 2 ms."""
    streams = [reports(attempt, uuid.uuid4().hex) for attempt in attempts]
    done = [await load.post_for(plane.url, len(attempts), seconds, lambda index: streams[index]) for _ in range(rounds)]
    return [POINTS * each.rate for each in done]


async def copied(plane: ControlPlane, rounds: int, seconds: float) -> list[float]:
    """Rows per second by COPY, from as many connections as there are nodes."""
    columns = ["job_id", "attempt_id", "rank", "name", "step", "value", "at"]
    connections = [await plane.connect() for _ in range(NODES)]
    now, job = datetime.now(UTC), uuid.uuid4()
    rows = [(job, job, 0, name, step, 1.0 / (step + 1), now) for step in range(STEPS) for name in NAMES]

    async def make(index: int):
        return lambda: connections[index].copy_records_to_table("metrics", records=rows, columns=columns)

    try:
        done = [await load.drive(NODES, seconds, make) for _ in range(rounds)]
    finally:
        for connection in connections:
            await connection.close()
    return [POINTS * each.rate for each in done]


# ------------------------------------------------------------------ charts

FILL = """
INSERT INTO metrics (job_id, attempt_id, rank, name, step, value, at)
SELECT CAST('{job}' AS uuid), CAST('{attempt}' AS uuid), 0, 'loss', n, 1.0 / (n + 1), {at}
FROM generate_series(1, {points}) AS n
"""
# What ingest keeps beside each point, for points that were put in by hand.
ROLL_UP = """
INSERT INTO metric_rollups (job_id, name, resolution_s, bucket, min, max, sum, count, last_step)
SELECT job_id, name, r, to_timestamp(floor(extract(epoch FROM at) / r) * r), min(value), max(value), sum(value),
       count(*), max(step)
FROM metrics, unnest(ARRAY[10, 60, 600]) AS r WHERE job_id = CAST('{job}' AS uuid) AND name = 'loss'
GROUP BY 1, 2, 3, 4
ON CONFLICT (job_id, name, resolution_s, bucket) DO UPDATE SET min = EXCLUDED.min, max = EXCLUDED.max,
    sum = EXCLUDED.sum, count = EXCLUDED.count, last_step = EXCLUDED.last_step
"""
GROUP = """
SELECT floor(extract(epoch FROM at) / {width_s}) AS bucket, min(value), max(value), avg(value), count(*)
FROM metrics WHERE job_id = CAST('{job}' AS uuid) AND name = 'loss' GROUP BY 1 ORDER BY 1
"""


def plain(prefixed: str) -> uuid.UUID:
    return uuid.UUID(hex=prefixed.partition("_")[2])


async def fill(plane: ControlPlane, attempt: PlayedAttempt, points: int) -> None:
    """A history of `points` points; its time is not counted."""
    ids = {"job": plain(attempt.job_id), "attempt": plain(attempt.id)}
    at = f"now() - make_interval(secs => ({points} - n) * {STEP_S})"
    connection = await plane.connect()
    try:
        since = f"now() - make_interval(secs => {points * STEP_S})"  # they are made ahead of time, not for the past
        await connection.execute(f"SELECT ensure_partitions({since}, now())")
        await connection.execute(FILL.format(points=points, at=at, **ids), timeout=300)
        await connection.execute(ROLL_UP.format(**ids), timeout=300)
        await connection.execute("ANALYZE metrics, metric_rollups", timeout=300)
    finally:
        await connection.close()


async def charts(plane: ControlPlane, attempt: PlayedAttempt, points: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run, by how much of the history is asked for."""
    found = {}
    async with load.Connection(plane.url) as connection:
        for window, share in WINDOWS.items():
            start = (
                datetime.fromtimestamp(time.time() - share * points * STEP_S, UTC).isoformat().replace("+00:00", "Z")
            )
            path = f"/v1/jobs/{attempt.job_id}/metrics?name=loss&from={start}&max_points={BUCKETS}"
            message = load.request("GET", path, token=plane.token)
            found[window] = [await timed(connection, message) for _ in range(2 + runs)][2:]
    return found


async def timed(connection: load.Connection, message: bytes) -> float:
    began = time.perf_counter()
    answer = await connection.expect(message)
    elapsed_ms = 1e3 * (time.perf_counter() - began)
    assert answer["series"][0]["points"], json.dumps(answer)[:300]
    return elapsed_ms


async def grouped(plane: ControlPlane, attempt: PlayedAttempt, points: int, runs: int) -> list[float]:
    query = GROUP.format(job=plain(attempt.job_id), width_s=points * STEP_S / BUCKETS)
    connection: asyncpg.Connection = await plane.connect()
    times = []
    try:
        for _ in range(runs):
            began = time.perf_counter()
            await connection.fetch(query)
            times.append(1e3 * (time.perf_counter() - began))
    finally:
        await connection.close()
    return times


def main() -> None:
    args = arguments(__doc__, points=1_000_000)
    rounds, seconds, runs = (3, 1.5, 10) if args.quick else (7, 4.0, 50)
    rate = Report(f"metric points taken, {NODES} nodes, {POINTS} points a report", "points/s", higher_is_better=True)
    chart = Report(f"a chart of {BUCKETS} buckets over {args.points:,} points", "ms", higher_is_better=False)
    with control_plane(scheduler=True) as plane:
        attempts = played_nodes.run_attempts(plane, NODES + 1)
        old = attempts.pop()
        line = rate.ours("Phalanx, over HTTP", asyncio.run(ingest(plane, attempts, rounds, seconds)), limit=20_000)
        rate.peer("COPY alone, no roll-ups", asyncio.run(copied(plane, rounds, seconds)), line)
        asyncio.run(fill(plane, old, args.points))
        for window, times in asyncio.run(charts(plane, old, args.points, runs)).items():
            note = f"p99 {percentiles(times, 0.99)[0]:.0f}"
            chart.ours(f"Phalanx, {window}", times, limit=50, note=note)
        times = asyncio.run(grouped(plane, old, args.points, max(3, runs // 5)))
        chart.peer("GROUP BY of the raw points", times, chart.lines[0])
    rate.show()
    chart.show()


if __name__ == "__main__":
    main()
