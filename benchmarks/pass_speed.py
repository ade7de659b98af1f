"""How long a pass takes: cold (`schedule` on a whole snapshot) and steady (`Planner.apply` of 100 events).

    python benchmarks/pass_speed.py [--size small]

A cluster that is almost full, 100 tenants in 10 departments with quotas, and a long queue of gangs of many shapes. An
event is a job that ends, one that is submitted, or one that the last plan started. Everything comes from one seed.
Times are CPU time of the one thread that plans, so that neighbours on the machine do not count.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.planner import Planner, schedule
from phalanx_server.scheduling.snapshot import Changes, Job, Node, Quota, Snapshot, Tenant

GPUS_PER_NODE = 8
DEPARTMENTS, TEAMS = 10, 10
GANGS = [(1, 1), (1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 1), (8, 8), (16, 8)]
PRIORITIES = [-10, 0, 0, 0, 10]
EVENTS = 100
MIN_RUNTIME_S = 600.0


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    nodes: int
    queued: int


SMALL, LARGE = Size(1_000, 10_000), Size(10_000, 100_000)


def tenants(size: Size) -> Iterator[Tenant]:
    """A company, its departments, their teams; the teams own it all and lend it."""
    yield Tenant(name="all")
    each = size.nodes * GPUS_PER_NODE // (DEPARTMENTS * TEAMS)
    for d in range(DEPARTMENTS):
        yield Tenant(name=f"all/{d}", parent="all")
        for t in range(TEAMS):
            quotas = {"h100": Quota(nominal=each * 7 // 10), "a100": Quota(nominal=each * 3 // 10)}
            yield Tenant(name=f"all/{d}/{t}", parent=f"all/{d}", quotas=quotas)


def nodes(size: Size) -> Iterator[Node]:
    """Seven in ten have the better GPUs."""
    for i in range(size.nodes):
        gpu_type = "h100" if i % 10 < 7 else "a100"
        yield Node(name=f"n{i:06}", gpu_type=gpu_type, gpus=GPUS_PER_NODE, cpus=96, memory_gib=1024, cluster="main")


def job(dice: Random, number: int, now: float) -> Job:
    """One more queued job."""
    replicas, gpus = dice.choice(GANGS)
    return Job(
        id=f"job{number:08}",
        tenant=f"all/{dice.randrange(DEPARTMENTS)}/{dice.randrange(TEAMS)}",
        state="queued",
        replicas=replicas,
        gpus_per_replica=gpus,
        cpus_per_replica=8 * gpus,
        memory_gib_per_replica=64 * gpus,
        submitted_at=now,
        priority=dice.choice(PRIORITIES),
        gpu_types=dice.choice([("h100",), ("a100",), ("h100", "a100")]),
        time_limit_s=float(dice.randrange(600, 90_000)),
    )


def carried_out(plan: Plan, jobs: dict[str, Job], now: float) -> tuple[Job, ...]:
    """The jobs that the plan starts, running, and those that it evicts, which wait again."""
    started = [
        replace(
            jobs[s.job],
            state="running",
            kept=None,
            started_at=now,
            protected_until=now + MIN_RUNTIME_S,
            placement=s.placement,
            gpu_type=s.gpu_type,
        )
        for s in plan.starts
    ]
    evicted = [jobs[p.job] for p in plan.preemptions]
    waiting = [
        replace(j, state="queued", placement=(), gpu_type=None, started_at=None, protected_until=None) for j in evicted
    ]
    kept = [replace(jobs[h.job], kept=h.kept) for h in plan.holds if h.kept is not None] if plan.preemptions else []
    return (*started, *waiting, *kept)


class Life:
    """A cluster that goes on: what happened since the last plan, event by event."""

    def __init__(self, size: Size, seed: int) -> None:
        self.dice, self.number, self.now = Random(seed), 0, 1_000.0
        empty = Snapshot(now=self.now, tenants=tuple(tenants(size)), nodes=tuple(nodes(size)))
        self.jobs = {j.id: j for j in (self._submit() for _ in range(size.queued + 3 * size.nodes))}
        self.empty = replace(empty, jobs=tuple(self.jobs.values()))
        self._run(schedule(self.empty))
        for _ in range(size.queued - sum(j.state == "queued" for j in self.jobs.values())):
            new = self._submit()
            self.jobs[new.id] = new
        self.full = replace(empty, jobs=tuple(self.jobs.values()))

    def _submit(self) -> Job:
        self.number += 1
        return job(self.dice, self.number, self.now + self.number)

    def _run(self, plan: Plan) -> tuple[Job, ...]:
        started = carried_out(plan, self.jobs, self.now)
        self.jobs.update((j.id, j) for j in started)
        return started

    def events(self, last: Plan) -> Changes:
        """A hundred events: what the last plan started, then ends and submissions by halves."""
        started = self._run(last)
        others = max(0, EVENTS - len(started))
        running = [i for i, j in self.jobs.items() if j.state == "running" and j not in started]
        ended = tuple(self.dice.sample(running, others // 2))
        new = tuple(self._submit() for _ in range(others - len(ended)))
        for id_ in ended:
            del self.jobs[id_]
        self.jobs.update((j.id, j) for j in new)
        self.now += 1
        return Changes(now=self.now, jobs=started + new, removed_jobs=ended)


def timed(run: Callable[[], Plan]) -> tuple[float, Plan]:
    """(CPU seconds, plan)"""
    begin = time.process_time()
    plan = run()
    return time.process_time() - begin, plan


def row(what: str, seconds: list[float], note: str = "") -> None:
    """One line of the table, in milliseconds."""
    ms = sorted(1_000 * s for s in seconds)
    p95 = ms[min(len(ms) - 1, int(0.95 * len(ms)))]
    print(f"  {what:<34} {statistics.median(ms):>9.1f} {p95:>9.1f} {ms[0]:>9.1f} {ms[-1]:>9.1f}  {note}")


def measure(size: Size, *, repeats: int, rounds: int, seed: int) -> None:
    """Print the table of one size."""
    life = Life(size, seed)
    waiting = sum(j.state == "queued" for j in life.jobs.values())
    print(f"\n{size.nodes:,} nodes × {GPUS_PER_NODE} GPUs, {waiting:,} queued, {len(life.jobs) - waiting:,} running")
    print(f"  {'CPU ms':<34} {'p50':>9} {'p95':>9} {'least':>9} {'most':>9}")
    first = [timed(lambda: schedule(life.empty)) for _ in range(repeats)]
    row("cold, nothing runs yet", [s for s, _ in first], f"{len(first[0][1].starts):,} start")
    cold = [timed(lambda: schedule(life.full)) for _ in range(repeats)]
    row("cold, cluster full", [s for s, _ in cold], f"{len(cold[0][1].starts):,} start")
    planner = Planner(life.full)
    plan, steady, starts = planner.plan(), [], 0
    for _ in range(rounds):
        changes = life.events(plan)
        seconds, plan = timed(lambda changes=changes: planner.apply(changes))
        steady.append(seconds)
        starts += len(plan.starts)
    groups = len(plan.hold_groups)
    row(f"steady, {EVENTS} events", steady, f"{starts / rounds:.0f} start each, {groups:,} groups of holds")
    row("spelling out every hold", [timed(lambda: plan.holds and plan)[0]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=("small", "large", "both"), default="both")
    options.add_argument("--repeats", type=int, default=3, help="cold passes (default 3)")
    options.add_argument("--rounds", type=int, default=30, help="steady passes (default 30)")
    options.add_argument("--seed", type=int, default=20)
    chosen = options.parse_args()
    sizes = {"small": [SMALL], "large": [LARGE], "both": [SMALL, LARGE]}[chosen.size]
    for size in sizes:
        gc.collect()
        measure(size, repeats=chosen.repeats, rounds=chosen.rounds, seed=chosen.seed)
    print(f"\nmost memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (inputs included)")


if __name__ == "__main__":
    main()
