"""How much each constant of the scheduler matters: the mean job completion time with a quarter to four times of it.

A constant is varied on the workloads on which the default policy, or the one named, uses it. The figures are means over
workloads of the mean next to that with the constant as it is, so a workload of long jobs counts as much as any other.
"""

import importlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

from phalanx_server.scheduling.snapshot import RECOMMENDED, Policy
from phalanx_server.simulation.figures import figures_of, summary_of
from phalanx_server.simulation.replay import Rules, replay
from phalanx_server.simulation.trace import read_profiles
from trace_workloads import TRACES, Workload

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
RIGID, WITH_PROFILES, FAIR = "rigid", "elastic", "fair sharing"
SCHEDULING = "phalanx_server.scheduling"
CONSTANTS: Sequence[tuple[str, str, str]] = (
    ("order", "AGING", RIGID),
    ("yielding", "CLEARLY_SHORTER", RIGID),
    ("yielding", "LEAST_RESTARTS", RIGID),
    ("planner", "MOST_RESERVATIONS", RIGID),
    ("predict", "WINDOW", RIGID),
    ("predict", "_ERROR_HALF_LIFE", RIGID),
    ("predict", "_BORROWED_WEIGHT", RIGID),
    ("growth", "CLEARLY", WITH_PROFILES),
    ("shares", "NEARNESS", WITH_PROFILES),
    ("fair", "ENTRY_PENALTY_S", FAIR),
)
"""Module, name, and where it matters."""


@dataclass(frozen=True)
class Table:
    """Mean JCT by constant and workload, at each factor."""

    runs: Mapping[tuple[str, str], Mapping[str, Sequence[Future[float]]]]

    def markdown(self) -> str:
        """One line for each constant; the range is over workloads."""
        parts = [
            "## How much the constants matter",
            "",
            "The mean job completion time with each constant at a quarter to four times its value, next to that with",
            "its value: the mean over workloads, and in brackets those that change the least and the most. Rigid: all",
            "but the two that take the longest to replay.",
            "",
            f"| constant | where | {' | '.join(f'× {factor:g}' for factor in FACTORS if factor != 1)} |",
            "|---|---|" + "---:|" * (len(FACTORS) - 1),
        ]
        for (constant, where), by_workload in self.runs.items():
            cells = []
            for at, factor in enumerate(FACTORS):
                if factor == 1:
                    continue
                usual = FACTORS.index(1.0)
                ratios = [runs[at].result() / runs[usual].result() for runs in by_workload.values()]
                cells.append(f"{sum(ratios) / len(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
            parts.append(f"| `{constant}` | {where} | {' | '.join(cells)} |")
        return "\n".join([*parts, ""])


def sensitivity(pool: ProcessPoolExecutor, workloads: Sequence[Workload]) -> Table:
    """Start the runs."""
    usual: dict[tuple[str, str], Future[float]] = {}
    runs: dict[tuple[str, str], dict[str, list[Future[float]]]] = {}
    for module, name, where in CONSTANTS:
        by_workload = runs[f"{module}.{name}", where] = {}
        for w in workloads:
            if not _matters(where, w):
                continue
            if (where, w.name) not in usual:
                usual[where, w.name] = pool.submit(mean_with, w, where, module, name, 1.0)
            by_workload[w.name] = [
                usual[where, w.name] if factor == 1 else pool.submit(mean_with, w, where, module, name, factor)
                for factor in FACTORS
            ]
    return Table({key: by_workload for key, by_workload in runs.items() if by_workload})


def _matters(where: str, workload: Workload) -> bool:
    if where == FAIR:
        return len(workload.tenants) > 1
    if where == WITH_PROFILES:
        return workload.profiles is not None
    return not workload.is_slow


def mean_with(workload: Workload, where: str, module: str, name: str, factor: float) -> float:
    """The mean JCT with a constant so many times as large. To be called in a process of its own, which it spoils."""
    its = importlib.import_module(f"{SCHEDULING}.{module}")
    value = getattr(its, name) * factor
    setattr(its, name, max(1, round(value)) if isinstance(getattr(its, name), int) else value)
    if name == "_ERROR_HALF_LIFE":
        setattr(its, "_FORGET", 0.5 ** (1 / value))  # noqa: B010  (what it is used for)
    rules = Rules(policy=Policy(fair_sharing=True) if where == FAIR else RECOMMENDED)
    if where == WITH_PROFILES:
        assert workload.profiles is not None, "it has profiles"
        rules = Rules(policy=RECOMMENDED, profiles=read_profiles(TRACES / workload.profiles))
    jobs = workload.jobs()
    said = figures_of([summary_of(replay(jobs, cluster, rules)) for cluster in workload.clusters])
    return float(said["avg_jct_s"])
