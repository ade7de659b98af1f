"""The cluster that `pass_speed.py` plans for: nodes in racks and blocks, a tree of tenants, the life of its jobs.

Owns what is drawn, all of it from one seed. A tenant's jobs come in kinds, as one script is run again and again: jobs
of a kind ask for the same and are expected to run for as long, so they are one class of the queue. How many kinds there
are is what makes a pass easy or hard. What runs at first is what a pass starts on the empty cluster. Its jobs leave
their minimum run time one by one, so that at any time some of them may be evicted, and not all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.predict import rounded
from phalanx_server.scheduling.snapshot import (
    Changes,
    Job,
    Node,
    PlacementItem,
    Policy,
    Quota,
    Snapshot,
    Tenant,
    Topology,
)

GPUS_PER_NODE = 8
NODES_PER_RACK, RACKS_PER_BLOCK = 20, 50
GOOD, OLD = "h100", "a100"  # each fifth rack has the old ones

# How many GPUs, as which gangs (replicas, GPUs of each), and how common next to the others; the largest fill up what
# is needed for the wanted number of running jobs.
SIZES = {
    1: ([(1, 1)], 30),
    2: ([(1, 2)], 14),
    4: ([(1, 4), (4, 1)], 14),
    8: ([(1, 8), (8, 1)], 24),
    16: ([(2, 8), (16, 1)], 11),
}
LARGEST_GPUS, LARGEST_GANG = 64, (8, 8)
PRIORITIES = (-10, 0, 0, 0, 10)
TIME_LIMITS_S = (3_600.0, 14_400.0, 14_400.0, 43_200.0, 86_400.0, 259_200.0)
MIN_RUNTIME_S = 1_200.0
WAITING_TO_STARTED = 4  # among those that start first, large gangs are rarer than among those that wait
SUBMITS, ENDS, CANCELS = 50, 35, 15

# Tenants for one question each, which have no jobs before: who may take back what others borrow, and who may only
# borrow.
OWNER, LARGE, GUEST = "all/owner", "all/large", "all/guest"


@dataclass(frozen=True)
class Size:
    """How much of everything. `kinds` of jobs there are in all; `running` is how many jobs shall fill the cluster."""

    nodes: int = 10_000
    queued: int = 100_000
    running: int = 8_000
    tenants: int = 1_000
    kinds: int = 10_000

    @property
    def good_nodes(self) -> int:
        return sum(gpu_type_of(i) == GOOD for i in range(self.nodes))

    @property
    def gang_nodes(self) -> int:
        """What the large gang takes."""
        return max(1, min(512, self.good_nodes // 8))

    @property
    def reclaimed_gpus(self) -> int:
        """What the owner takes back."""
        return min(4_000, self.good_nodes * GPUS_PER_NODE // 8)


def gpu_type_of(node: int) -> str:
    return OLD if node // NODES_PER_RACK % 5 == 4 else GOOD


def nodes(size: Size) -> Iterator[Node]:
    for i in range(size.nodes):
        rack = i // NODES_PER_RACK
        labels = {"rack": f"r{rack:04}", "block": f"b{rack // RACKS_PER_BLOCK:03}"}
        yield Node(
            name=f"n{i:06}",
            gpu_type=gpu_type_of(i),
            gpus=GPUS_PER_NODE,
            cpus=96,
            memory_gib=1024,
            cluster="main",
            labels=labels,
        )


def tenants(size: Size, dice: Random) -> Iterator[Tenant]:
    """A company, its departments, their teams; the teams own nearly all, in very different shares, and lend it. The
    company has a pool for everybody beside that, so that a full cluster is not the same as a used up quota."""
    departments = max(1, round(size.tenants**0.5))
    total = {GOOD: GPUS_PER_NODE * size.good_nodes, OLD: GPUS_PER_NODE * (size.nodes - size.good_nodes)}
    yield Tenant(name="all", quotas={gpu_type: Quota(nominal=gpus // 5) for gpu_type, gpus in total.items()})
    yield from (Tenant(name=f"all/{d}", parent="all") for d in range(departments))
    teams = size.tenants - 4 - departments
    shares = [dice.paretovariate(1.5) for _ in range(teams)]
    set_aside = {GOOD: size.reclaimed_gpus + GPUS_PER_NODE * size.gang_nodes, OLD: 0}
    scale = {gpu_type: (total[gpu_type] - set_aside[gpu_type]) / sum(shares) for gpu_type in total}
    for i, share in enumerate(shares):
        quotas = {gpu_type: Quota(nominal=int(share * scale[gpu_type])) for gpu_type in total}
        yield Tenant(name=f"all/{i % departments}/{i // departments}", parent=f"all/{i % departments}", quotas=quotas)
    yield Tenant(name=OWNER, parent="all", quotas={GOOD: Quota(nominal=size.reclaimed_gpus)})
    yield Tenant(name=LARGE, parent="all", quotas={GOOD: Quota(nominal=GPUS_PER_NODE * size.gang_nodes)})
    yield Tenant(name=GUEST, parent="all", quotas={GOOD: Quota(nominal=0)})


def kinds(size: Size, teams: list[str], dice: Random) -> list[Job]:
    """The jobs that are submitted again and again, as patterns: every team has some, some teams many."""
    activity = [dice.paretovariate(1.0) for _ in teams]
    owners = [*teams, *dice.choices(teams, activity, k=max(0, size.kinds - len(teams)))]
    return [_kind(dice, tenant, _gang(size, dice)) for tenant in owners[: size.kinds]]


def _gang(size: Size, dice: Random) -> tuple[int, int]:
    small_mean = sum(g * weight for g, (_, weight) in SIZES.items()) / sum(weight for _, weight in SIZES.values())
    mean = WAITING_TO_STARTED * size.nodes * GPUS_PER_NODE / size.running
    if dice.random() < (mean - small_mean) / (LARGEST_GPUS - small_mean):
        return LARGEST_GANG
    gangs, _ = dice.choices(list(SIZES.values()), [weight for _, weight in SIZES.values()])[0]
    return dice.choice(gangs)


def _kind(dice: Random, tenant: str, gang: tuple[int, int]) -> Job:
    replicas, gpus = gang
    limit_s = dice.choice(TIME_LIMITS_S)
    spread = replicas * gpus > GPUS_PER_NODE
    topology = dice.choice([Topology(required="rack"), Topology(preferred="block"), None, None]) if spread else None
    return Job(
        id="",
        tenant=tenant,
        state="queued",
        replicas=replicas,
        gpus_per_replica=gpus,
        cpus_per_replica=8 * gpus,
        memory_gib_per_replica=64 * gpus,
        submitted_at=0.0,
        priority=dice.choice(PRIORITIES),
        gpu_types=dice.choice([(GOOD,), (GOOD,), (OLD,), (GOOD, OLD)]),
        topology=topology,
        time_limit_s=limit_s,
        predicted_s=rounded(limit_s * min(1.0, dice.lognormvariate(-1.2, 0.8))),
    )


class Life:
    """A cluster that goes on: what happened since the last plan, event by event."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.dice, self.number, self.now = size, Random(seed), 0, 1_000_000.0
        self.policy = Policy(topology_levels=("block", "rack"))
        self.tenants, self.nodes = tuple(tenants(size, self.dice)), tuple(nodes(size))
        self.kinds = kinds(size, [t.name for t in self.tenants if t.name.count("/") == 2], self.dice)
        self.popularity = [self.dice.paretovariate(2.0) for _ in self.kinds]
        self.gone: list[str] = []
        self.jobs = {j.id: j for j in self._submitted(size.queued + 2 * size.running, over_s=86_400.0)}
        self.empty = self.snapshot()
        self._begin(schedule(self.empty))
        queued = [j.id for j in self.jobs.values() if j.state == "queued"]
        for id_ in self.dice.sample(queued, max(0, len(queued) - size.queued)):
            del self.jobs[id_]

    def snapshot(self) -> Snapshot:
        """Everything, as it is now."""
        return Snapshot(
            now=self.now,
            policy=self.policy,
            tenants=self.tenants,
            nodes=self.nodes,
            jobs=tuple(self.jobs.values()),
        )

    def _submitted(self, count: int, *, over_s: float) -> list[Job]:
        """So many new jobs, submitted in the seconds that just passed."""
        drawn = self.dice.choices(self.kinds, self.popularity, k=max(0, count))
        return [self.new(kind, self.now - over_s * (1 - i / len(drawn))) for i, kind in enumerate(drawn)]

    def new(self, kind: Job, submitted_at: float | None = None) -> Job:
        """One more job of a kind."""
        self.number += 1
        at = self.now if submitted_at is None else submitted_at
        return replace(kind, id=f"job{self.number:08}", submitted_at=at)

    def _begin(self, plan: Plan) -> None:
        """What runs at first: it started some time ago."""
        for start in plan.starts:
            job = self.jobs[start.job]
            self.jobs[job.id] = replace(
                job,
                state="running",
                started_at=self.now - self.dice.random() * MIN_RUNTIME_S,
                protected_until=self.now + self.dice.random() * MIN_RUNTIME_S,
                gpu_type=start.gpu_type,
                placement=start.placement,
            )

    def events(self, last: Plan) -> Changes:
        """What the last plan did, and a hundred events: submits, ends and cancels."""
        changed = {j.id: j for j in self._carried_out(last)}
        self.jobs.update(changed)
        running = [i for i, j in self.jobs.items() if j.state == "running" and i not in changed]
        queued = [i for i, j in self.jobs.items() if j.state == "queued" and i not in changed]
        removed = self.dice.sample(running, min(ENDS, len(running)))
        removed += self.dice.sample(queued, min(CANCELS, len(queued)))
        new = self._submitted(SUBMITS, over_s=1.0)
        for id_ in removed:
            del self.jobs[id_]
        self.jobs.update((j.id, j) for j in new)
        self.now += 1
        return Changes(now=self.now, jobs=(*changed.values(), *new), removed_jobs=tuple(removed))

    def _carried_out(self, plan: Plan) -> Iterator[Job]:
        """Who stops is gone by the next pass and waits again; who starts runs; who waits for others keeps its place."""
        for id_ in self.gone:
            if id_ in self.jobs:
                gone = replace(self.jobs[id_], state="queued", placement=(), gpu_type=None)
                yield replace(gone, started_at=None, protected_until=None, for_job=None)
        self.gone = [victim.job for victim in plan.preemptions]
        for victim in plan.preemptions:
            yield replace(self.jobs[victim.job], state="stopping", for_job=victim.for_job)
        for start in plan.starts:
            yield replace(
                self.jobs[start.job],
                state="running",
                kept=None,
                started_at=self.now,
                protected_until=self.now + MIN_RUNTIME_S,
                placement=start.placement,
                gpu_type=start.gpu_type,
            )
        keeps = {job: group.kept for group in plan.hold_groups if group.kept is not None for job in group.jobs}
        for id_, seat in keeps.items():
            if self.jobs[id_].kept != seat:
                yield replace(self.jobs[id_], kept=seat)
        started = {start.job for start in plan.starts}
        stale = [j for j in self.jobs.values() if j.kept is not None and j.id not in keeps and j.id not in started]
        yield from (replace(job, kept=None) for job in stale)

    def cleared(self, names: set[str], *, tenant: str) -> dict[str, Job]:
        """All jobs, but nothing runs on these nodes: whatever did is gone, and one job of `tenant` takes each place
        that it leaves on other nodes."""
        jobs = dict(self.jobs)
        for job in self.jobs.values():
            if not any(item.node in names for item in job.placement):
                continue
            del jobs[job.id]
            for item in job.placement:
                if item.node not in names:
                    pattern = replace(job, tenant=tenant, topology=None, replicas=item.replicas, placement=(item,))
                    filler = self.new(pattern)
                    jobs[filler.id] = filler
        return jobs

    def good_nodes(self, count: int) -> list[str]:
        """The first so many with the better GPUs: they lie together."""
        return [n.name for n in self.nodes if n.gpu_type == GOOD][:count]

    def guests(self, names: list[str]) -> list[Job]:
        """One-GPU jobs of the guest on every GPU of these nodes."""
        pattern = replace(self.gang(GUEST, replicas=1, gpus=1), state="running", gpu_type=GOOD)
        pattern = replace(pattern, priority=-10, started_at=self.now - MIN_RUNTIME_S)
        places = [(PlacementItem(name, 1),) for name in names for _ in range(GPUS_PER_NODE)]
        return [replace(self.new(pattern), placement=place) for place in places]

    def gang(self, tenant: str, *, replicas: int, gpus: int, topology: Topology | None = None) -> Job:
        """A gang that comes before all others of its tenant."""
        kind = _kind(self.dice, tenant, (1, 1))
        sized = replace(kind, replicas=replicas, gpus_per_replica=gpus, cpus_per_replica=gpus)
        sized = replace(sized, memory_gib_per_replica=8 * gpus, priority=1_000, gpu_types=(GOOD,), topology=topology)
        return self.new(sized)
