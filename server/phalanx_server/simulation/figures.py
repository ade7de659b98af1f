"""Owns the figures of a replay: completion and waiting times, what was used and lost, and how tenants fared.

Refuses to know how it went about. JCT = from submission to the end. Waiting = all time in the queue, also between
attempts. Slowdown = JCT ÷ run time, bounded: both count at least `SHORT_S` (Feitelson and Rudolph, JSSPP 1998).
Fairness over tenants is Jain's index (1 = all alike) of the inverse of their mean slowdowns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phalanx_server.scheduling.predict import Calibration
from phalanx_server.simulation.course import Course
from phalanx_server.simulation.replay import Replayed

SHORT_S = 10.0


def figures_of(replays: Sequence[Replayed], *, skipped: int = 0) -> dict[str, Any]:
    """One JSON document about all clusters together. `skipped`: jobs of tenants that have no cluster."""
    courses = [course for done in replays for course in done.courses]
    ended = [course for course in courses if course.ended_at is not None]
    jct_s, wait_s = np.array([_jct_s(c) for c in ended]), np.array([_wait_s(c) for c in ended])
    passes_s = np.array([seconds for done in replays for seconds in done.passes_s])
    first = min((c.row.submit_s for c in courses), default=0.0)
    makespan_s = max((_end(c) for c in ended), default=first) - first
    gpus = sum(done.cluster.gpus for done in replays)
    used_gpu_s = sum(_gpu_s(c) for c in courses)
    tenants = _tenants(ended)
    return {
        "jobs": len(ended),
        "never_started": len(courses) - len(ended) + skipped,
        "gpus": gpus,
        "avg_jct_s": _mean(jct_s),
        "p50_jct_s": _percentile(jct_s, 50),
        "p99_jct_s": _percentile(jct_s, 99),
        "avg_wait_s": _mean(wait_s),
        "p99_wait_s": _percentile(wait_s, 99),
        "makespan_s": round(makespan_s, 3),
        "utilization": round(used_gpu_s / (gpus * makespan_s), 4) if gpus and makespan_s else 0.0,
        "preemptions": sum(done.preemptions for done in replays),
        "resizes": sum(done.resizes for done in replays),
        "migrations": sum(done.migrations for done in replays),
        "lost_gpu_s": round(sum(_lost_gpu_s(c) for c in courses), 3),
        "avg_slowdown": _mean(np.array([_slowdown(c) for c in ended])),
        "fairness": {"jain": _jain([1 / t["avg_slowdown"] for t in tenants.values()]), "tenants": tenants},
        "predictions": sum((done.calibration for done in replays), Calibration()).document(),
        "passes": len(passes_s),
        "pass_p50_ms": _percentile(1_000 * passes_s, 50),
        "pass_p99_ms": _percentile(1_000 * passes_s, 99),
        "passes_s": round(float(passes_s.sum()), 3),
    }


def _tenants(ended: Sequence[Course]) -> Mapping[str, dict[str, Any]]:
    by_tenant: dict[str, list[Course]] = {}
    for course in ended:
        by_tenant.setdefault(course.row.tenant, []).append(course)
    return {
        name: {
            "jobs": len(courses),
            "gpu_s": round(sum(_gpu_s(c) for c in courses), 3),
            "avg_jct_s": _mean(np.array([_jct_s(c) for c in courses])),
            "avg_wait_s": _mean(np.array([_wait_s(c) for c in courses])),
            "avg_slowdown": _mean(np.array([_slowdown(c) for c in courses])),
        }
        for name, courses in sorted(by_tenant.items())
    }


def _end(course: Course) -> float:
    assert course.ended_at is not None, "it has ended"
    return course.ended_at


def _jct_s(course: Course) -> float:
    return _end(course) - course.row.submit_s


def _wait_s(course: Course) -> float:
    return _jct_s(course) - sum(a.ended_at - a.began_at for a in course.attempts)


def _slowdown(course: Course) -> float:
    return max(_jct_s(course), SHORT_S) / max(course.total_s, SHORT_S)


def _gpu_s(course: Course) -> float:
    return sum((a.ended_at - a.began_at) * a.replicas for a in course.attempts) * course.job.gpus_per_replica


def _lost_gpu_s(course: Course) -> float:
    """Held without progress: while stopping and restarting."""
    lost = ((a.ended_at - a.began_at - a.progressed_s) * a.replicas for a in course.attempts)
    return max(0.0, sum(lost)) * course.job.gpus_per_replica


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 3) if len(values) else 0.0


def _percentile(values: np.ndarray, percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3) if len(values) else 0.0


def _jain(shares: Sequence[float]) -> float:
    """Jain, Chiu and Hawe, DEC-TR-301, 1984."""
    return round(sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares)), 4) if shares else 1.0
