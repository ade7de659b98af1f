"""Owns the figures of a replay: completion and waiting times, what was used and lost, and how tenants fared.

Refuses to know how it went about. JCT = from submission to the end. Waiting = all time in the queue, also between
attempts. Slowdown = JCT ÷ run time, bounded: both count at least `SHORT_S` (Feitelson and Rudolph, JSSPP 1998).
Fairness over tenants is Jain's index (1 = all alike) of the inverse of their mean slowdowns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phalanx_server.scheduling.predict import Calibration
from phalanx_server.simulation.course import Course
from phalanx_server.simulation.replay import Replayed

SHORT_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one job. `ended_at` None = it never ended, and the times after it mean nothing."""

    tenant: str
    submitted_at: float
    ended_at: float | None
    jct_s: float
    wait_s: float
    slowdown: float
    gpu_s: float
    lost_gpu_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What counts of one cluster's replay: small enough to be handed from one process to another."""

    gpus: int
    outcomes: Sequence[Outcome]
    preemptions: int
    resizes: int
    migrations: int
    passes_s: Sequence[float]
    calibration: Calibration


def summary_of(done: Replayed) -> Summary:
    """Of one cluster's replay."""
    return Summary(
        done.cluster.gpus,
        [_outcome(course) for course in done.courses],
        done.preemptions,
        done.resizes,
        done.migrations,
        done.passes_s,
        done.calibration,
    )


def _outcome(course: Course) -> Outcome:
    jct_s = (course.ended_at or 0.0) - course.row.submit_s
    held = [(a.ended_at - a.began_at, a.progressed_s, a.replicas) for a in course.attempts]
    gpus = course.job.gpus_per_replica
    return Outcome(
        tenant=course.row.tenant,
        submitted_at=course.row.submit_s,
        ended_at=course.ended_at,
        jct_s=jct_s,
        wait_s=jct_s - sum(held_s for held_s, _, _ in held),
        slowdown=max(jct_s, SHORT_S) / max(course.total_s, SHORT_S),
        gpu_s=sum(held_s * replicas for held_s, _, replicas in held) * gpus,
        lost_gpu_s=max(0.0, sum((held_s - ran_s) * replicas for held_s, ran_s, replicas in held)) * gpus,
    )


def figures_of(parts: Sequence[Summary], *, skipped: int = 0) -> dict[str, Any]:
    """One JSON document about all clusters together. `skipped`: jobs of tenants that have no cluster."""
    outcomes = [outcome for part in parts for outcome in part.outcomes]
    ended = [outcome for outcome in outcomes if outcome.ended_at is not None]
    jct_s, wait_s = np.array([o.jct_s for o in ended]), np.array([o.wait_s for o in ended])
    passes_s = np.array([seconds for part in parts for seconds in part.passes_s])
    first = min((o.submitted_at for o in outcomes), default=0.0)
    makespan_s = max((o.submitted_at + o.jct_s for o in ended), default=first) - first
    gpus = sum(part.gpus for part in parts)
    used_gpu_s = sum(o.gpu_s for o in outcomes)
    tenants = _tenants(ended)
    return {
        "jobs": len(ended),
        "never_started": len(outcomes) - len(ended) + skipped,
        "gpus": gpus,
        "avg_jct_s": _mean(jct_s),
        "p50_jct_s": _percentile(jct_s, 50),
        "p99_jct_s": _percentile(jct_s, 99),
        "avg_wait_s": _mean(wait_s),
        "p99_wait_s": _percentile(wait_s, 99),
        "makespan_s": round(makespan_s, 3),
        "utilization": round(used_gpu_s / (gpus * makespan_s), 4) if gpus and makespan_s else 0.0,
        "preemptions": sum(part.preemptions for part in parts),
        "resizes": sum(part.resizes for part in parts),
        "migrations": sum(part.migrations for part in parts),
        "lost_gpu_s": round(sum(o.lost_gpu_s for o in outcomes), 3),
        "avg_slowdown": _mean(np.array([o.slowdown for o in ended])),
        "fairness": {"jain": _jain([1 / t["avg_slowdown"] for t in tenants.values()]), "tenants": tenants},
        "predictions": sum((part.calibration for part in parts), Calibration()).document(),
        "passes": len(passes_s),
        "pass_p50_ms": _percentile(1_000 * passes_s, 50),
        "pass_p99_ms": _percentile(1_000 * passes_s, 99),
        "passes_s": round(float(passes_s.sum()), 3),
    }


def _tenants(ended: Sequence[Outcome]) -> Mapping[str, dict[str, Any]]:
    by_tenant: dict[str, list[Outcome]] = {}
    for outcome in ended:
        by_tenant.setdefault(outcome.tenant, []).append(outcome)
    return {
        name: {
            "jobs": len(outcomes),
            "gpu_s": round(sum(o.gpu_s for o in outcomes), 3),
            "avg_jct_s": _mean(np.array([o.jct_s for o in outcomes])),
            "avg_wait_s": _mean(np.array([o.wait_s for o in outcomes])),
            "avg_slowdown": _mean(np.array([o.slowdown for o in outcomes])),
        }
        for name, outcomes in sorted(by_tenant.items())
    }


def _mean(values: np.ndarray) -> float:
    return round(float(values.mean()), 3) if len(values) else 0.0


def _percentile(values: np.ndarray, percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3) if len(values) else 0.0


def _jain(shares: Sequence[float]) -> float:
    """Jain, Chiu and Hawe, DEC-TR-301, 1984."""
    return round(sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares)), 4) if shares else 1.0
