"""Policies on real traces: the average job completion time of each, beside a bound and what peers recorded.

    python benchmarks/traces.py [--workload NAME]… [--policy NAME]… [--docs]

Every figure of ours is a replay through the scheduler's own planner (`phalanx simulate`); what a policy's pass knows is
what a live one would, except in rows that say "true run times". Peers' figures and bounds are those of
shared/traces/README.md, recorded by their own simulators. `--docs` writes docs/traces.md and docs/traces.svg.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.simulation.figures import figures_of, summary_of
from phalanx_server.simulation.replay import Rules, replay
from phalanx_server.simulation.trace import Cluster, Pool, TraceJob, read_clusters, read_profiles, read_trace

ROOT = Path(__file__).resolve().parents[1]
TRACES = ROOT.parent / "shared" / "traces"
T4, V100 = "T4 (AWS g4dn.12xlarge)", "V100 profile"

POLICIES: Mapping[str, Rules] = {
    "first fit (no backfill)": Rules(policy=Policy(backfill=False)),
    "FIFO with backfill": Rules(),
    "FIFO with backfill, true run times": Rules(clairvoyant=True),
    "shortest, predicted": Rules(policy=Policy(order="shortest")),
    "shortest, true run times": Rules(policy=Policy(order="shortest"), clairvoyant=True),
    "fair sharing": Rules(policy=Policy(fair_sharing=True)),
}
ELASTIC = "elastic"


@dataclass(frozen=True)
class Workload:
    """A trace on a cluster. `recorded`: average JCT by others, in seconds; `bound`: what no schedule can beat."""

    name: str
    trace: str
    clusters: Sequence[Cluster]
    tenants: Sequence[str] = ()
    profiles: str | None = None
    bound: float | None = None
    recorded: Mapping[str, float] = field(default_factory=dict)

    def jobs(self) -> list[TraceJob]:
        return [job for job in read_trace(TRACES / self.trace) if not self.tenants or job.tenant in self.tenants]


def pollux(number: int, ours: float, tiresias: float) -> Workload:
    return Workload(
        f"Pollux w{number}",
        f"pollux/pollux_tuned_w{number}.csv",
        [Cluster("pollux", (Pool(16, 4, T4),))],
        profiles="pollux/profiles.json",
        recorded={"Pollux (elastic)": ours, "Tiresias": tiresias},
    )


def workloads() -> Iterator[Workload]:
    """All of them; of Philly those virtual clusters that are short of GPUs."""
    for vc, bound, recorded in (
        ("2869ce", 74_492, {"first fit": 78_204, "EASY, true": 78_281, "SJF, true": 77_883, "SRTF, true": 77_877}),
        ("103959", 25_743, {"first fit": 26_207, "EASY, true": 26_195, "SJF, true": 25_976, "SRTF, true": 25_882}),
    ):
        its = [c for c in read_clusters(TRACES / "philly.cluster.json") if c.tenant == vc]
        yield Workload(f"Philly {vc}", "philly.csv.gz", its, tenants=[vc], bound=bound, recorded=recorded)
    small = ("103959", "2869ce", "e13805", "ed69ec")
    shared = [Cluster("shared", (Pool(12, 8, "24GB"),))]
    yield Workload("Philly, four VCs on a quarter of their nodes", "philly.csv.gz", shared, tenants=small)
    for jobs, nodes, bound, recorded in (
        (120, 8, 5_511, {"first fit": 8_636, "SJF, true": 7_772, "SRTF, true": 7_150}),
        (460, 32, 5_766, {"first fit": 9_738, "SJF, true": 7_885, "SRTF, true": 7_471}),
    ):
        its = [Cluster("shockwave", (Pool(nodes, 4, V100),))]
        yield Workload(f"Shockwave {jobs}", f"shockwave/shockwave_{jobs}.csv", its, bound=bound, recorded=recorded)
    for number, ours, tiresias in ((1, 2_089, 2_474), (2, 3_323, 5_145), (3, 2_189, 3_876), (4, 2_721, 3_280)):
        yield pollux(number, ours, tiresias)


@dataclass(frozen=True)
class Row:
    """One policy on one workload."""

    policy: str
    jct_s: float
    is_ours: bool
    more: str = ""


def measure(workload: Workload, policies: Sequence[str]) -> Iterator[Row]:
    """Our rows, then the others'."""
    jobs = workload.jobs()
    for name in policies:
        rules = POLICIES.get(name)
        if name == ELASTIC:
            if workload.profiles is None:
                continue
            rules = Rules(profiles=read_profiles(TRACES / workload.profiles))
        assert rules is not None, name
        if name == "fair sharing" and len({job.tenant for job in jobs}) < 2:
            continue
        yield run(workload, jobs, name, rules)
    for name, jct_s in workload.recorded.items():
        yield Row(name, jct_s, is_ours=False, more="recorded")
    if workload.bound is not None:
        yield Row("no schedule is below", workload.bound, is_ours=False, more="bound")


def run(workload: Workload, jobs: Sequence[TraceJob], name: str, rules: Rules) -> Row:
    """Replay it, and tell on standard error how long that took."""
    began = time.process_time()
    said = figures_of([summary_of(replay(jobs, cluster, rules)) for cluster in workload.clusters])
    took_s = time.process_time() - began
    print(f"{workload.name}, {name}: {said['avg_jct_s']:,.0f} s ({took_s:.1f} s CPU)", file=sys.stderr, flush=True)
    stops = said["preemptions"] + said["resizes"] + said["migrations"]
    more = f"p99 {said['p99_jct_s']:,.0f} s, {said['utilization']:.0%} used" + (f", {stops:,} stops" if stops else "")
    more += f", Jain {said['fairness']['jain']:.2f}" if len(said["fairness"]["tenants"]) > 1 else ""
    return Row(f"Phalanx: {name}", said["avg_jct_s"], is_ours=True, more=more)


def markdown(results: Mapping[str, Sequence[Row]]) -> str:
    """A table per workload, best first."""
    parts = []
    for name, rows in results.items():
        parts += [f"### {name}", "", "| policy | average JCT (s) | |", "|---|---:|---|"]
        for row in sorted(rows, key=lambda row: row.jct_s):
            shown = f"**{row.policy}**" if row.is_ours else row.policy
            parts.append(f"| {shown} | {row.jct_s:,.0f} | {row.more} |")
        parts.append("")
    return "\n".join(parts)


def svg(results: Mapping[str, Sequence[Row]]) -> str:
    """Bars by workload, each as long as its JCT next to the workload's largest."""
    line, left, width, right = 18, 310, 420, 90
    y, shapes = 10, []
    for name, rows in results.items():
        most = max(row.jct_s for row in rows)
        y += line
        shapes.append(f'<text x="10" y="{y}" class="head">{escape(name)}: average job completion time</text>')
        for row in sorted(rows, key=lambda row: row.jct_s):
            y += line
            length = width * row.jct_s / most
            kind = "ours" if row.is_ours else "bound" if row.more == "bound" else "theirs"
            shapes += [
                f'<text x="{left - 8}" y="{y}" class="name">{escape(row.policy)}</text>',
                f'<rect x="{left}" y="{y - 12}" width="{length:.1f}" height="14" class="{kind}"/>',
                f'<text x="{left + length + 6:.1f}" y="{y}">{row.jct_s:,.0f} s</text>',
            ]
        y += line // 2
    style = (
        "text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.name{text-anchor:end}"
        ".ours{fill:#2a6fdb}.theirs{fill:#9aa4b2}.bound{fill:#d8dde4}"
    )
    size = f'viewBox="0 0 {left + width + right} {y + 10}" width="{left + width + right}" height="{y + 10}"'
    back = f'<rect width="{left + width + right}" height="{y + 10}" fill="#fff"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>", back, *shapes, "</svg>", ""]
    )


HEAD = """# Policies on real traces

Made by `benchmarks/traces.py --docs`: replays through the scheduler's own planner (`phalanx simulate`), beside what
others recorded and a bound that no schedule can beat. Lower is better. The pass knows time limits and predictions from
jobs that have ended, as live; only rows that say so know the true run times. Each restart costs 30 s. Preemption in the
recorded rows "SRTF, true" is free, so they are bounds of a kind too. Stops are evictions, resizes and moves. Jain's
index says how alike the tenants' mean slowdowns are (1 = all alike).

![Average job completion time by workload and policy](traces.svg)

"""


def write_docs(results: Mapping[str, Sequence[Row]]) -> None:
    """The page and its picture."""
    (ROOT / "docs" / "traces.md").write_text(HEAD + markdown(results), encoding="utf-8")
    (ROOT / "docs" / "traces.svg").write_text(svg(results), encoding="utf-8")


def main() -> None:
    if not TRACES.is_dir():
        sys.exit(f"the traces are not at {TRACES}")
    known, names = list(workloads()), [*POLICIES, ELASTIC]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workload", action="append", choices=[w.name for w in known], help="default: all")
    options.add_argument("--policy", action="append", choices=names, help="default: all")
    options.add_argument("--docs", action="store_true", help="write docs/traces.md and docs/traces.svg")
    chosen = options.parse_args()
    chosen_workloads = [w for w in known if w.name in (chosen.workload or [w.name])]
    results = {w.name: list(measure(w, chosen.policy or names)) for w in chosen_workloads}
    print(markdown(results))
    if chosen.docs:
        write_docs(results)


if __name__ == "__main__":
    main()
