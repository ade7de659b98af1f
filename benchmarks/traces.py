"""Policies on real traces: the job completion times of each, beside bounds, aims, and what peers recorded.

    python benchmarks/traces.py [--workload NAME]… [--policy NAME]… [--docs] [--sensitivity] [--processes N]

Every figure of ours is a replay through the scheduler's own planner (`phalanx simulate`); what a policy's pass knows is
what a live one would, except in rows that say "true". Strict FIFO and the oracles are computed exactly
(`trace_bounds`); peers' figures are those of shared/traces/README.md, recorded by their own simulators. `--docs` writes
docs/traces.md and docs/traces.svg, in one run. `--sensitivity` adds how much each constant of the scheduler matters.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from phalanx_server.scheduling.snapshot import RECOMMENDED, Policy
from phalanx_server.simulation.figures import figures_of, summary_of
from phalanx_server.simulation.replay import Rules, replay
from phalanx_server.simulation.trace import read_profiles
from trace_bounds import Figures, strict_fifo, with_oracle
from trace_pages import BOUND, OURS, RECORDED, Row, markdown, svg
from trace_sensitivity import sensitivity
from trace_workloads import ROOT, TRACES, Workload, workloads

USUAL = "shortest, longer ones yield (the default)"
ELASTIC = "elastic (the default with profiles)"
FAIR = "fair sharing"
STRICT = "strict FIFO"
ORACLES = {"SRSF, true, free stops": "srsf", "SRTF, true, free stops": "srtf"}
POLICIES: Mapping[str, Rules] = {
    "first fit": Rules(policy=Policy(backfill=False)),
    "FIFO with backfill": Rules(),
    "FIFO with backfill, true": Rules(clairvoyant=True),
    "shortest": Rules(policy=Policy(order="shortest")),
    USUAL: Rules(policy=RECOMMENDED),
    "shortest, longer ones yield, true": Rules(policy=RECOMMENDED, clairvoyant=True),
    FAIR: Rules(policy=Policy(fair_sharing=True)),
    ELASTIC: Rules(policy=RECOMMENDED),
}


def measure(workload: Workload, policy: str) -> Figures:
    """One policy on one workload; on standard error, how long that took."""
    began, jobs = time.process_time(), workload.jobs()
    if policy == STRICT:
        said = strict_fifo(jobs, workload.clusters)
    elif policy in ORACLES:
        said = with_oracle(jobs, workload.clusters, ORACLES[policy])
    else:
        rules = POLICIES[policy]
        if policy == ELASTIC:
            assert workload.profiles is not None, "it has profiles"
            rules = Rules(policy=rules.policy, profiles=read_profiles(TRACES / workload.profiles))
        said = figures_of([summary_of(replay(jobs, cluster, rules)) for cluster in workload.clusters])
    took_s = time.process_time() - began
    print(f"{workload.name}, {policy}: {said['avg_jct_s']:,.0f} s ({took_s:.1f} s CPU)", file=sys.stderr, flush=True)
    return said


def applies(policy: str, workload: Workload) -> bool:
    """Does it make sense there?"""
    if policy == FAIR:
        return len(workload.tenants) > 1
    return policy != ELASTIC or workload.profiles is not None


def rows_of(workload: Workload, measured: Mapping[str, Figures]) -> list[Row]:
    """What was measured, and what others recorded."""
    srsf = measured.get("SRSF, true, free stops")
    rows = []
    for policy, said in measured.items():
        aim = workload.aim(elastic=policy == ELASTIC, srsf_s=srsf["avg_jct_s"]) if srsf else None
        rows.append(Row(policy, BOUND if policy in (STRICT, *ORACLES) else OURS, said, aim))
    rows += [Row(f"{name}, recorded", RECORDED, {"avg_jct_s": jct_s}) for name, jct_s in workload.recorded.items()]
    if workload.bound is not None:
        rows.append(Row("no schedule is below", BOUND, {"avg_jct_s": workload.bound}))
    return rows


HEAD = """# Policies on real traces

Made by `benchmarks/traces.py --docs --sensitivity` in one run: replays through the scheduler's own planner (`phalanx
simulate`), in bold, beside what others recorded and what can be computed without a planner. Lower is better. The pass
knows time limits and predictions from jobs that have ended, as live; only rows that say "true" know the true run times.
Each restart of ours costs 30 s. "Free stops" may stop anybody at any moment at no cost, which nobody can, so they are
bounds of a kind. *÷ aim*: the mean next to what it should stay below, which is Pollux where jobs are elastic, 85 % of
Tiresias where the same jobs are rigid, EASY with true run times on Philly's virtual clusters, and elsewhere 1.5 times
SRSF with true run times.

![Average job completion time by workload and policy](traces.svg)

"""


def main() -> None:
    if not TRACES.is_dir():
        sys.exit(f"the traces are not at {TRACES}")
    known, names = list(workloads()), [STRICT, *ORACLES, *POLICIES]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workload", action="append", choices=[w.name for w in known], help="default: all")
    options.add_argument("--policy", action="append", choices=names, help="default: all")
    options.add_argument("--docs", action="store_true", help="write docs/traces.md and docs/traces.svg")
    options.add_argument("--sensitivity", action="store_true", help="also vary each constant")
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = options.parse_args()
    shown = [w for w in known if w.name in (chosen.workload or [w.name])]
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        pending: dict[str, dict[str, Future[Figures]]] = {
            w.name: {p: pool.submit(measure, w, p) for p in chosen.policy or names if applies(p, w)} for w in shown
        }
        varied = sensitivity(pool, shown) if chosen.sensitivity else None
        results: dict[str, Sequence[Row]] = {
            w.name: rows_of(w, {policy: said.result() for policy, said in pending[w.name].items()}) for w in shown
        }
        page = markdown(results) + (f"\n{varied.markdown()}" if varied is not None else "")
    print(page)
    if chosen.docs:
        (ROOT / "docs" / "traces.md").write_text(HEAD + page, encoding="utf-8")
        (ROOT / "docs" / "traces.svg").write_text(svg(results), encoding="utf-8")


if __name__ == "__main__":
    main()
