"""How long a pass takes on a cluster that is full, with a long queue (`pass_world` says of what kind):

    python benchmarks/pass_speed.py [--quick] [--growth]

* cold: a planner made from a whole snapshot, and its first plan
* steady: `Planner.apply` of what the last plan did and of 100 events (submits, ends, cancels)
* a gang of 512 whole nodes within one block: placed where there is room, and told why it waits where there is none
* the verdict on a gang of 80 GPUs, with its reason in words
* an owner takes back 4,000 GPUs from one-GPU jobs

`--growth` adds how cold and steady passes grow with nodes, queued jobs and kinds of jobs. Each size is measured in a
process of its own, whose most memory (inputs included) is printed. Times are CPU time of the thread that plans, so that
neighbours on the machine count little.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import pickle
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from measure import percentile, show
from pass_world import GPUS_PER_NODE, GUEST, LARGE, OWNER, Life, Size
from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.planner import Planner, schedule
from phalanx_server.scheduling.snapshot import Changes, Job, Snapshot, Topology

QUICK = Size(nodes=1_000, queued=10_000, running=800, tenants=100, kinds=1_000)
VERDICT_NODES = 10
PARTS = ("cold", "steady", "gang", "verdict", "reclaim")
GROWTH_PARTS = ("cold", "steady")


@dataclass
class Figure:
    """One line: CPU seconds, and what to know beside them."""

    seconds: list[float]
    note: str = ""


@dataclass
class Figures:
    """Of one size. `classes` are groups of identical queued jobs, of which each is considered once in a pass."""

    size: Size
    queued: int = 0
    running: int = 0
    classes: int = 0
    peak_mib: float = 0.0
    lines: dict[str, Figure] = field(default_factory=dict)

    def title(self) -> str:
        size = f"{self.size.nodes:,} nodes × {GPUS_PER_NODE} GPUs, {self.size.tenants:,} tenants"
        jobs = f"{self.queued:,} queued in {self.classes:,} classes, {self.running:,} running"
        return f"{size}, {jobs}; most memory {self.peak_mib:,.0f} MiB (CPU ms)"


@dataclass(frozen=True)
class Work:
    """What to measure of one size."""

    size: Size
    parts: tuple[str, ...]
    repeats: int
    rounds: int
    seed: int
    world: Path | None = None

    def life(self) -> Life:
        """Drawn anew, or as it was kept in `world`."""
        if self.world is not None and self.world.exists():
            return pickle.loads(self.world.read_bytes())
        life = Life(self.size, self.seed)
        if self.world is not None:
            self.world.write_bytes(pickle.dumps(life))
        return life


def timed(run: Callable[[], Plan]) -> tuple[float, Plan]:
    """(CPU seconds, plan)"""
    gc.collect()
    begin = time.process_time()
    plan = run()
    return time.process_time() - begin, plan


def measure(work: Work) -> Figures:
    """The figures of one size; in a process of its own."""
    life = work.life()
    full = life.snapshot()
    if life.size != work.size:
        raise SystemExit(f"{work.world} is a world of another size: {life.size}")
    planner = Planner(full)
    running = sum(job.state == "running" for job in full.jobs)
    figures = Figures(work.size, len(full.jobs) - running, running, planner.size.classes)
    lines = figures.lines
    if "cold" in work.parts:
        lines["cold, nothing runs yet"] = _cold(life.empty, 1)
        lines["cold, cluster full"] = _cold(full, work.repeats)
    if "gang" in work.parts:
        lines |= _gang(life, work.repeats)
    if "verdict" in work.parts:
        lines["verdict on an 80-GPU gang"] = _verdict(life, work.repeats)
    if "reclaim" in work.parts:
        lines[f"{work.size.reclaimed_gpus:,} one-GPU jobs reclaim"] = _reclaim(life)
    if "steady" in work.parts:  # last, for life goes on in it
        lines["steady, 100 events"] = _steady(planner, life, work.rounds)
    figures.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def _cold(snapshot: Snapshot, repeats: int) -> Figure:
    runs = [timed(lambda: schedule(snapshot)) for _ in range(repeats)]
    return Figure([seconds for seconds, _ in runs], _said(runs[0][1]))


def _said(plan: Plan) -> str:
    said = {"start": len(plan.starts), "evicted": len(plan.preemptions)}
    return ", ".join(f"{count:,} {what}" for what, count in said.items())


def _steady(planner: Planner, life: Life, rounds: int) -> Figure:
    plan, seconds, starts, evicted = planner.plan(), [], 0, 0
    for _ in range(rounds):
        changes = life.events(plan)
        took, plan = timed(lambda changes=changes: planner.apply(changes))
        seconds.append(took)
        starts += len(plan.starts)
        evicted += len(plan.preemptions)
    each = f"{starts / rounds:.0f} start, {evicted / rounds:.0f} evicted each"
    return Figure(seconds, each)


def _asked(snapshot: Snapshot, jobs: tuple[Job, ...], repeats: int) -> tuple[Figure, Plan]:
    """What a pass says to these jobs, on a planner that has seen the rest; their holds put into words."""
    planner = Planner(snapshot)
    planner.plan()
    seconds: list[float] = []
    for _ in range(repeats):
        took, plan = timed(lambda: _worded(planner.apply(Changes(now=snapshot.now, jobs=jobs)), jobs))
        seconds.append(took)
        planner.apply(Changes(now=snapshot.now, removed_jobs=tuple(job.id for job in jobs)))
    return Figure(seconds, _said(plan)), plan


def _worded(plan: Plan, jobs: tuple[Job, ...]) -> Plan:
    plan.hold_of(jobs[0].id)
    return plan


def _gang(life: Life, repeats: int) -> dict[str, Figure]:
    wanted = life.size.gang_nodes
    roomy = life.cleared(set(life.good_nodes(wanted)), tenant=GUEST)
    block = Topology(required="block")
    owned = life.gang(LARGE, replicas=wanted, gpus=GPUS_PER_NODE, topology=block)
    placed, plan = _asked(replace(life.snapshot(), jobs=tuple(roomy.values())), (owned,), repeats)
    assert owned.id in {start.job for start in plan.starts}, plan.hold_of(owned.id)
    guest = life.gang(GUEST, replicas=wanted, gpus=GPUS_PER_NODE, topology=block)
    waits, plan = _asked(life.snapshot(), (guest,), repeats)
    hold = plan.hold_of(guest.id)
    assert hold is not None, "there is no room for it"
    waits.note = f"{hold.reason.value}: {hold.message}"
    return {f"gang of {wanted} nodes in a block, placed": placed, "the same where all is full": waits}


def _verdict(life: Life, repeats: int) -> Figure:
    gang = life.gang(GUEST, replicas=VERDICT_NODES, gpus=GPUS_PER_NODE)
    figure, plan = _asked(life.snapshot(), (gang,), repeats)
    hold = plan.hold_of(gang.id)
    assert hold is not None, "there is no room for it"
    figure.note = f"{hold.reason.value}: {hold.message}"
    return figure


def _reclaim(life: Life) -> Figure:
    names = life.good_nodes(life.size.reclaimed_gpus // GPUS_PER_NODE)
    jobs = life.cleared(set(names), tenant=GUEST)
    jobs |= {job.id: job for job in life.guests(names)}
    kind = life.gang(OWNER, replicas=1, gpus=1)
    owners = tuple(life.new(kind) for _ in range(life.size.reclaimed_gpus))
    figure, plan = _asked(replace(life.snapshot(), jobs=tuple(jobs.values())), owners, 1)
    mine = {job.id for job in owners}
    assert sum(victim.for_job in mine for victim in plan.preemptions), "somebody makes room"
    return figure


def growth(full: Size, *, quick: bool) -> list[Size]:
    """The sizes of the table: nodes, then queued jobs, then kinds of them, each with the rest as in `full`."""
    steps = (100, 10) if quick else (100, 10, 1)
    by_nodes = [replace(full, nodes=full.nodes // n, running=full.running // n) for n in steps]
    by_queue = [replace(full, queued=full.queued // n) for n in steps if n > 1]
    by_kinds = [replace(full, kinds=full.kinds // 10), replace(full, kinds=full.kinds * 10)]
    return [*by_nodes, *by_queue, *by_kinds]


def in_own_process(work: Work) -> Figures:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, work).result()


def show_figures(figures: Figures) -> None:
    columns = ["", "n", "p50", "p99", "min–max", ""]
    rows = [[name, str(len(f.seconds)), *_cells(f.seconds), f.note] for name, f in figures.lines.items()]
    show(figures.title(), columns, rows)


def _cells(seconds: list[float]) -> list[str]:
    ms = [1_000 * s for s in seconds]
    return [f"{percentile(ms, 0.5):,.0f}", f"{percentile(ms, 0.99):,.0f}", f"{min(ms):,.0f}–{max(ms):,.0f}"]


def show_growth(sizes: list[Figures]) -> None:
    rows: list[list[str]] = []
    for figures in sizes:
        size, cold, steady = figures.size, figures.lines["cold, cluster full"], figures.lines["steady, 100 events"]
        amounts = [size.nodes, figures.queued, figures.running, size.kinds, figures.classes]
        row = [f"{amount:,}" for amount in amounts] + [_cells(cold.seconds)[0], *_cells(steady.seconds)[:2]]
        rows.append([*row, f"{figures.peak_mib:,.0f}"])
    columns = ["nodes", "queued", "running", "kinds", "classes", "cold p50", "steady p50", "p99", "MiB"]
    show("How it grows (CPU ms)", columns, rows)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, fewer rounds")
    parser.add_argument("--growth", action="store_true", help="the table of sizes as well")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts")
    for name in ("nodes", "queued", "running", "tenants", "kinds"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(Size(), name):,}")
    parser.add_argument("--repeats", type=int, default=3, help="of each but steady passes (default 3)")
    parser.add_argument("--rounds", type=int, help="steady passes (default 100, quick 30)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--world", type=Path, metavar="FILE", help="keep the drawn cluster here, and use it next time")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    base = QUICK if chosen.quick else Size()
    given = {name: getattr(chosen, name) for name in ("nodes", "queued", "running", "tenants", "kinds")}
    size = replace(base, **{name: value for name, value in given.items() if value is not None})
    rounds = chosen.rounds or (30 if chosen.quick else 100)
    work = Work(size, tuple(chosen.only), chosen.repeats, rounds, chosen.seed, chosen.world)
    show_figures(in_own_process(work))
    if chosen.growth:
        sizes = growth(size, quick=chosen.quick)
        show_growth([in_own_process(Work(each, GROWTH_PARTS, 1, rounds, chosen.seed)) for each in sizes])
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
