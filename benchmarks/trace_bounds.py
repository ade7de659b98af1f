"""What needs no planner: strict first come, first served, and what an oracle could do that stops jobs for free.

All GPUs of a cluster count as one pool, as in the simulators of others: a job is a gang of one-GPU replicas and can be
spread. `strict_fifo` never lets anybody pass a job that waits. `with_oracle` knows the true run times and preempts at
every event, at no cost: the shortest remaining GPU-seconds first (`srsf`), or the shortest remaining time (`srtf`).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from phalanx_server.simulation.trace import Cluster, TraceJob

Figures = Mapping[str, float]
Key = Callable[[TraceJob, float], float]

BY: Mapping[str, Key] = {"srsf": lambda job, left_s: left_s * job.gpus, "srtf": lambda _, left_s: left_s}


def strict_fifo(jobs: Sequence[TraceJob], clusters: Sequence[Cluster]) -> Figures:
    """Each job starts as soon as all before it have started and its GPUs are free."""
    return _figures([end for cluster in clusters for end in _in_turn(_of(jobs, cluster), cluster.gpus)])


def with_oracle(jobs: Sequence[TraceJob], clusters: Sequence[Cluster], by: str) -> Figures:
    """The best first at every moment, the others stopped."""
    return _figures([end for cluster in clusters for end in _preempting(_of(jobs, cluster), cluster.gpus, BY[by])])


def _of(jobs: Sequence[TraceJob], cluster: Cluster) -> list[TraceJob]:
    return [job for job in jobs if cluster.tenant in (None, job.tenant) and job.gpus <= cluster.gpus]


_Ends = list[tuple[TraceJob, float]]


def _in_turn(jobs: Sequence[TraceJob], gpus: int) -> _Ends:
    ends, running, now, free = [], [], 0.0, gpus
    for job in jobs:
        now = max(now, job.submit_s)
        while running and (running[0][0] <= now or free < job.gpus):
            at, given = heapq.heappop(running)
            now, free = max(now, at), free + given
        free -= job.gpus
        heapq.heappush(running, (now + job.duration_s, job.gpus))
        ends.append((job, now + job.duration_s))
    return ends


def _preempting(jobs: Sequence[TraceJob], gpus: int, key: Key) -> _Ends:
    ends: _Ends = []
    left_s: dict[str, float] = {}
    there: list[TraceJob] = []
    running: list[TraceJob] = []
    at, now = 0, 0.0
    while at < len(jobs) or there:
        next_end = min((left_s[job.id] for job in running), default=float("inf")) + now
        next_at = min(next_end, jobs[at].submit_s) if at < len(jobs) else next_end
        for job in running:
            left_s[job.id] -= next_at - now
        now = next_at
        done = {job.id for job in running if left_s[job.id] <= 1e-6}
        ends += [(job, now) for job in running if job.id in done]
        there = [job for job in there if job.id not in done]
        while at < len(jobs) and jobs[at].submit_s <= now:
            there.append(jobs[at])
            left_s[jobs[at].id] = jobs[at].duration_s
            at += 1
        there.sort(key=lambda job: (key(job, left_s[job.id]), job.submit_s, job.id))
        running, free = [], gpus
        for job in there:
            if job.gpus <= free:
                free -= job.gpus
                running.append(job)
            if not free:
                break
    return ends


def _figures(ends: _Ends) -> Figures:
    jct_s = np.array([end - job.submit_s for job, end in ends])
    return {
        "jobs": len(ends),
        "avg_jct_s": float(jct_s.mean()),
        "p50_jct_s": float(np.percentile(jct_s, 50)),
        "p99_jct_s": float(np.percentile(jct_s, 99)),
        "makespan_s": max(end for _, end in ends) - min(job.submit_s for job, _ in ends),
    }
