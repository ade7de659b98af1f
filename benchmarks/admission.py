"""How fast jobs are admitted: the shapes of Kueue's and KAI-Scheduler's own scale tests, through the real service.

    python benchmarks/admission.py [--quick] [--only kueue-baseline kueue-large kai]

Server, scheduler and PostgreSQL with durable commits are processes of their own; the agent is the real one, on nodes
that are not there (`waiting_agent`): what is started only waits for its run time. Jobs come over HTTP at the times that
the shape says, in batches of what is due each tenth of a second. Times are those that the service recorded: a job is
admitted when its start is decided and holds GPUs until its end is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
from admission_shapes import BASELINE, GPU, KAI, KAI_QUICK, LARGE, JobSet, KaiShape, QueueShape, smaller
from control_plane import ControlPlane, control_plane, cpu_s, peak_mib
from load import Connection, request
from measure import percentile, show
from phalanx_worker.protocol import NodeFacts
from waiting_agent import make_nodes, waiting_agent

BATCH_EVERY_S, BATCH_MOST = 0.1, 1_000
GPUS_PER_NODE = 8
FOREVER_S = 86_400.0
TIMEOUT_S = 3_600.0

ADMITTED = """
    SELECT j.name, j.tenant_id, extract(epoch FROM j.submitted_at)::float8 AS submitted,
           extract(epoch FROM min(a.created_at))::float8 AS admitted,
           extract(epoch FROM max(a.ended_at))::float8 AS ended,
           sum(extract(epoch FROM a.ended_at - a.created_at))::float8 AS held_s,
           sum(extract(epoch FROM a.ended_at - a.started_at))::float8 AS ran_s, count(*) AS attempts
    FROM jobs j JOIN attempts a ON a.job_id = j.id GROUP BY j.id
"""
OPEN = "SELECT count(*) FROM jobs WHERE finished_at IS NULL"


@dataclass(frozen=True)
class Bench:
    """A service that runs, with an agent that serves its nodes."""

    plane: ControlPlane
    agent_pid: int
    passes: Path
    http: httpx.Client
    cpu_before_s: dict[str, float] = field(default_factory=dict)

    def pass_ms(self) -> list[float]:
        return [1_000 * float(line.split()[0]) for line in self.passes.read_text().splitlines()]

    def of_processes(self, measure: Callable[[int], float]) -> dict[str, float]:
        """A figure of each process."""
        pids = self.plane.pids() | {"agent": self.agent_pid}
        return {name: measure(pid) for name, pid in pids.items()}

    def cpu_s(self) -> dict[str, float]:
        """CPU time of each process since it was ready."""
        return {name: s - self.cpu_before_s.get(name, 0.0) for name, s in self.of_processes(cpu_s).items()}

    def create_tenant(self, path: str, **quota: int) -> None:
        body = {"path": path, "quotas": {GPU: quota} if quota else {}}
        self.http.post("/v1/tenants", json=body).raise_for_status()

    def submit(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        """The ids of jobs submitted in batches."""
        answers: list[str] = []
        for i in range(0, len(jobs), BATCH_MOST):
            answer = self.http.post("/v1/jobs/batch", json={"jobs": jobs[i : i + BATCH_MOST]}).raise_for_status()
            answers += [job["id"] for job in answer.json()["items"]]
        return answers

    def value(self, query: str) -> Any:
        return self.rows(query)[0][0]

    def rows(self, query: str) -> list[Any]:
        async def ask() -> list[Any]:
            connection = await self.plane.connect()
            try:
                return await connection.fetch(query)
            finally:
                await connection.close()

        return asyncio.run(ask())

    def wait(self, done: Callable[[], bool], *, poll_s: float = 0.5) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not done():
            assert time.monotonic() < until, "it takes too long"
            time.sleep(poll_s)


@contextmanager
def bench(nodes: Sequence[NodeFacts]) -> Iterator[Bench]:
    """Run one, until its nodes are known."""
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as name:
        passes = Path(name) / "passes"
        with control_plane(scheduler=True, passes=passes) as plane:
            headers = {"Authorization": f"Bearer {plane.token}"}
            with (
                httpx.Client(base_url=plane.url, headers=headers, timeout=120) as http,
                waiting_agent(plane.url, plane.cluster_token, nodes) as pid,
            ):
                running = Bench(plane, pid, passes, http)
                running.wait(lambda: running.value("SELECT count(*) FROM nodes WHERE alive") == len(nodes))
                running.cpu_before_s.update(running.of_processes(cpu_s))
                yield running


def job(tenant: str, name: str, *, gpus: int, run_s: float, priority: int = 0, **more: Any) -> dict[str, Any]:
    resources = {"gpus": gpus} if "resources" not in more else {}
    return {
        "name": name,
        "tenant": tenant,
        "priority": priority,
        "resources": resources,
        "run": {"command": f"sleep {run_s}"},
    } | more


# ------------------------------------------------------------------ Kueue


async def submit_in_time(plane: ControlPlane, shape: QueueShape) -> float:
    """Submit everything when its time has come; when that began."""
    ticks = groupby(shape.submits(), key=lambda entry: int(entry[0] / BATCH_EVERY_S))
    async with Connection(plane.url) as connection:
        began, began_at = time.monotonic(), time.time()
        for tick, due in ticks:
            jobs = [_job_of(tenant, kind) for _, tenant, kind in due]
            await asyncio.sleep(max(0.0, began + tick * BATCH_EVERY_S - time.monotonic()))
            for i in range(0, len(jobs), BATCH_MOST):
                document = {"jobs": jobs[i : i + BATCH_MOST]}
                await connection.expect(request("POST", "/v1/jobs/batch", token=plane.token, document=document))
    return began_at


def _job_of(tenant: str, kind: JobSet) -> dict[str, Any]:
    return job(tenant, kind.name, gpus=kind.gpus, run_s=kind.run_s, priority=kind.priority)


def replay(shape: QueueShape) -> None:
    """Run a shape and print what came of it."""
    with bench(make_nodes(shape.gpus // GPUS_PER_NODE, gpus=GPUS_PER_NODE)) as running:
        for c in range(shape.cohorts):
            running.create_tenant(f"cohort{c}")
        for tenant in shape.tenants:
            running.create_tenant(tenant, nominal=shape.nominal, borrowing_limit=shape.borrowing_limit)
        began_at = asyncio.run(submit_in_time(running.plane, shape))
        submitted_s = time.time() - began_at
        running.wait(lambda: running.value(OPEN) == 0)
        show_replay(shape, running, running.rows(ADMITTED), began_at, submitted_s)


def show_replay(shape: QueueShape, running: Bench, jobs: Sequence[Any], began_at: float, submitted_s: float) -> None:
    wall_s = max(each["ended"] for each in jobs) - began_at
    gpus = {each.name: each.gpus for each in shape.sets}
    held = sum(gpus[each["name"]] * each["held_s"] for each in jobs)
    ran = sum(gpus[each["name"]] * (each["ran_s"] or 0.0) for each in jobs)
    theirs = shape.published
    table = [
        ["wall time (s)", f"{wall_s:,.1f}", f"{theirs.wall_s:,.0f}" if theirs else ""],
        ["the least there can be (s)", f"{shape.least_s:,.1f}", ""],
        ["admissions per second", f"{len(jobs) / wall_s:,.1f}", f"{shape.jobs / theirs.wall_s:,.1f}" if theirs else ""],
        ["GPUs held / running, mean", f"{_share(held, shape, wall_s)} / {_share(ran, shape, wall_s)}", _use(theirs)],
        ["last submit accepted after (s)", f"{submitted_s:,.1f}", ""],
        ["attempts beyond the first", f"{sum(each['attempts'] for each in jobs) - len(jobs):,}", ""],
    ]
    for kind in shape.sets:
        waits = [each["admitted"] - each["submitted"] for each in jobs if each["name"] == kind.name]
        mean = f"{sum(waits) / len(waits):,.1f} / {percentile(waits, 0.5):,.1f} / {percentile(waits, 0.99):,.1f}"
        said = (theirs.admission_s or {}).get(kind.name) if theirs else None
        table.append([f"to admission, {kind.name}: mean / p50 / p99 (s)", mean, f"{said:,.1f} (mean)" if said else ""])
    title = f"{shape.title}: {shape.jobs:,} jobs of {len(shape.tenants):,} queues on {shape.gpus:,} GPUs"
    show(title, ["", "Phalanx", "Kueue"], table + _process_rows(running))
    if theirs:
        print(f"  theirs: {theirs.source}")


def _share(gpu_s: float, shape: QueueShape, wall_s: float) -> str:
    return f"{gpu_s / (shape.gpus * wall_s):.1%}"


def _use(theirs: Any) -> str:
    return f"{theirs.use:.1%} of the quota" if theirs and theirs.use else ""


def _process_rows(running: Bench) -> list[list[str]]:
    ms = running.pass_ms()
    times = f"{percentile(ms, 0.5):,.0f} / {percentile(ms, 0.99):,.0f} / {max(ms):,.0f} ({len(ms):,})"
    return [
        ["scheduler's tick, p50 / p99 / most (ms)", times, ""],
        ["CPU time (s)", _of_each(running.cpu_s(), 1), ""],
        ["most memory (MiB)", _of_each(running.of_processes(peak_mib), 0), ""],
    ]


def _of_each(figures: dict[str, float], digits: int) -> str:
    return ", ".join(f"{name} {value:,.{digits}f}" for name, value in figures.items())


# ------------------------------------------------------------------ KAI


def replay_kai(shape: KaiShape) -> None:
    gang_s, gang_rows = kai_gang(shape)
    with bench(make_nodes(shape.nodes, gpus=shape.gpus_per_node)) as running:
        running.create_tenant("kai")
        spare = shape.verdict_gpus - 1
        running.create_tenant("kai/filler", nominal=shape.gpus - spare)
        running.create_tenant("kai/reclaimer", nominal=shape.verdict_gpus)
        fill_s = kai_fill(running, shape)
        verdict_s, reason = kai_verdict(running, shape)
        rows = _process_rows(running)
    measured = [
        (f"{shape.gpus:,} one-GPU jobs run on {shape.nodes} nodes", fill_s),
        (f"a gang of {shape.gang_nodes} whole nodes runs, racks preferred", gang_s),
        (f"told why {shape.verdict_gpus} GPUs cannot be had in the full cluster: {reason}", verdict_s),
    ]
    table = [
        [name, f"{seconds:,.2f}", f"{theirs:,.0f}" if theirs else ""]
        for (name, seconds), theirs in zip(measured, shape.published_s, strict=True)
    ]
    show("KAI-Scheduler's scale tests (seconds)", ["", "Phalanx", "KAI"], table + gang_rows + rows)
    print("  theirs: NVIDIA/KAI-Scheduler, test/e2e/scale on KWOK nodes")


def kai_gang(shape: KaiShape) -> tuple[float, list[list[str]]]:
    """Seconds from the submit of the gang until all of it runs, on an empty cluster of its own."""
    with bench(make_nodes(shape.gang_nodes, gpus=shape.gpus_per_node, labels=shape.labels())) as running:
        etag = running.http.get("/v1/policy").raise_for_status().headers["ETag"]
        settings = {"settings": {"topology_levels": ["zone", "block", "rack"]}}
        running.http.put("/v1/policy", json=settings, headers={"If-Match": etag}).raise_for_status()
        running.create_tenant("kai")
        resources = {
            "replicas": shape.gang_nodes,
            "gpus_per_replica": shape.gpus_per_node,
            "topology": {"preferred": "rack"},
        }
        began = time.monotonic()
        running.submit([job("kai", "gang", gpus=0, run_s=FOREVER_S, resources=resources)])
        running.wait(lambda: running.value("SELECT count(*) FROM jobs WHERE state = 'running'") == 1, poll_s=0.02)
        return time.monotonic() - began, [[f"gang: {name}", *rest] for name, *rest in _process_rows(running)]


def kai_fill(running: Bench, shape: KaiShape) -> float:
    """Seconds from the first submit until every GPU runs a job of its own."""
    jobs = [job("kai/filler", "one", gpus=1, run_s=FOREVER_S) for _ in range(shape.gpus)]
    began = time.monotonic()
    running.submit(jobs)
    running.wait(lambda: running.value("SELECT count(*) FROM jobs WHERE state = 'running'") == shape.gpus, poll_s=0.1)
    return time.monotonic() - began


def kai_verdict(running: Bench, shape: KaiShape) -> tuple[float, str]:
    """Seconds until a gang is told why it waits, which could take back one GPU too few; and the reason."""
    resources = {"replicas": shape.verdict_nodes, "gpus_per_replica": shape.gpus_per_node}
    began = time.monotonic()
    (job_id,) = running.submit([job("kai/reclaimer", "gang", gpus=0, run_s=1, resources=resources)])
    while (hold := running.http.get(f"/v1/jobs/{job_id}").raise_for_status().json()["hold"]) is None:
        time.sleep(0.01)
    return time.monotonic() - began, f"{hold['reason']}, {hold['message']}"


# ------------------------------------------------------------------ command

SHAPES: dict[str, Callable[[bool], None]] = {
    "kueue-baseline": lambda quick: replay(smaller(BASELINE, cohorts=1, part=5) if quick else BASELINE),
    "kueue-large": lambda quick: replay(smaller(LARGE, cohorts=1, part=2) if quick else LARGE),
    "kai": lambda quick: replay_kai(KAI_QUICK if quick else KAI),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of each shape")
    parser.add_argument("--only", choices=list(SHAPES), nargs="+", default=list(SHAPES), help="these shapes")
    chosen = parser.parse_args()
    for name in chosen.only:
        SHAPES[name](chosen.quick)
    print(f"  load average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
