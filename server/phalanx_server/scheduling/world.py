"""Owns what is true between passes: nodes and what is free on them, quotas and their use, and the queue, kept up to
date.

Refuses to decide anything. `absorb` must leave what a new `World` of the changed snapshot would be: whatever the
changes touch is taken back as it was counted and counted anew.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from phalanx_server.domain.resources import Demand, Shape
from phalanx_server.scheduling.fit import EmptyCluster
from phalanx_server.scheduling.nodes import GPUS, Amounts, NodeTable, amounts_of, same_pool
from phalanx_server.scheduling.order import Queue
from phalanx_server.scheduling.quota import QuotaForest, QuotaUse
from phalanx_server.scheduling.snapshot import (
    Changes,
    Job,
    Node,
    Policy,
    Seat,
    Snapshot,
    changed,
    spread,
    time_limit_of,
)
from phalanx_server.scheduling.speedup import progress


@dataclass(frozen=True, slots=True)
class Load:
    """What one job takes: so much on these nodes, and of its tenant's quotas. `account`: who shares nodes with it."""

    tenant: str
    account: str
    demand: Demand
    columns: list[int]
    replicas: list[int]
    amounts: Amounts

    def without(self, parts: Iterable["Load"]) -> "Load":
        """What is left of it without these parts, each on nodes of its own."""
        amounts, replicas, demand = self.amounts.copy(), list(self.replicas), Counter(dict(self.demand))
        for part in parts:
            for column, count in zip(part.columns, part.replicas, strict=True):
                replicas[self.columns.index(column)] -= count
            amounts[:, [self.columns.index(column) for column in part.columns]] -= part.amounts
            demand.subtract(dict(part.demand))
        left = tuple((r, n) for r, n in demand.items() if n)
        return replace(self, amounts=amounts, replicas=replicas, demand=left)


@dataclass(frozen=True, slots=True)
class Running:
    """A job that runs, with what it takes."""

    job: Job
    load: Load
    gpus: int
    gpu_type: str | None

    def loss(self, now: float, restart_s: float) -> float:
        """The GPU-seconds that stopping it now costs, `restart_s` for its next start included."""
        since = max(self.job.started_at or now, self.job.checkpointed_at or float("-inf"))
        return self.gpus * (max(0.0, now - since) + restart_s)

    def may_be_disturbed(self, now: float, *, even_protected: bool = False) -> bool:
        """Is it outside its minimum run time? And not started at this very moment, which no job waits for in vain: so
        passes over the same moment come to rest."""
        if self.job.started_at is not None and self.job.started_at >= now:
            return False
        return even_protected or self.job.protected_until is None or self.job.protected_until <= now


class World:
    """A snapshot, indexed for passes. Its arrays are what is so; a pass works on copies."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._load(snapshot)

    def _load(self, snapshot: Snapshot) -> None:
        self.now, self.policy = snapshot.now, snapshot.policy
        self.tenants, self.maintenance = snapshot.tenants, snapshot.maintenance
        self.nodes = {n.name: n for n in snapshot.nodes}
        self.jobs: dict[str, Job] = {}
        self.table = NodeTable(snapshot.nodes, snapshot.policy.topology_levels)
        self.empty = EmptyCluster(self.table)
        self.free: Amounts = self.table.total.copy()
        self.forest = QuotaForest(snapshot.tenants)
        self.use = QuotaUse(self.forest)
        self.queue = Queue(snapshot.policy, run_limits_matter=bool(snapshot.maintenance))
        self.array_jobs: Counter[str] = Counter()
        self.running: dict[str, Running] = {}
        self.of_tenant: dict[str, dict[str, Running]] = {}
        self.elastic: dict[str, Running] = {}
        self.stopping: dict[str, Job] = {}
        self.kept: set[str] = set()
        for job in snapshot.jobs:
            self._put(job)
        self.ends = sorted(end for job in snapshot.jobs if (end := self._end_of(job)) is not None)

    def snapshot(self) -> Snapshot:
        """All of it as a snapshot again."""
        return Snapshot(
            now=self.now,
            policy=self.policy,
            tenants=self.tenants,
            nodes=tuple(self.nodes.values()),
            maintenance=self.maintenance,
            jobs=tuple(self.jobs.values()),
        )

    def absorb(self, changes: Changes) -> None:
        """Make the changes. Those that move the ground (tenants, policy, windows, the set of nodes) load all anew."""
        if self._moves_the_ground(changes):
            self._load(changed(self.snapshot(), changes))
            return
        self.now = changes.now
        self._replace_nodes([n for n in changes.nodes if self.nodes[n.name] != n])
        for job in changes.jobs:
            if self.jobs.get(job.id) != job:
                self._drop(job.id)
                self._put(job)
                if (end := self._end_of(job)) is not None:
                    insort(self.ends, end)
        for id_ in changes.removed_jobs:
            self._drop(id_)

    def undo_of(self, changes: Changes) -> Changes:
        """The changes that would take these back."""
        jobs, nodes = {j.id for j in changes.jobs}, {n.name for n in changes.nodes}
        return Changes(
            now=self.now,
            jobs=tuple(self.jobs[i] for i in sorted(jobs.union(changes.removed_jobs)) if i in self.jobs),
            removed_jobs=tuple(sorted(jobs - self.jobs.keys())),
            nodes=tuple(self.nodes[n] for n in sorted(nodes.union(changes.removed_nodes)) if n in self.nodes),
            removed_nodes=tuple(sorted(nodes - self.nodes.keys())),
            tenants=self.tenants,
            policy=self.policy,
            maintenance=self.maintenance,
        )

    def _moves_the_ground(self, changes: Changes) -> bool:
        given = (
            (changes.tenants, self.tenants),
            (changes.policy, self.policy),
            (changes.maintenance, self.maintenance),
        )
        return (
            any(new is not None and new != old for new, old in given)
            or any(n in self.nodes for n in changes.removed_nodes)
            or any(n.name not in self.nodes or not same_pool(n, self.nodes[n.name]) for n in changes.nodes)
        )

    def _replace_nodes(self, nodes: list[Node]) -> None:
        if not nodes:
            return
        is_as_large = True
        for node in nodes:
            grown = self.table.replace(node)
            is_as_large &= not grown.any()
            self.free[:, self.table.column[node.name]] += grown
            self.nodes[node.name] = node
        if is_as_large:
            self.empty.forget_states()
        else:
            self.empty = EmptyCluster(self.table)

    def _put(self, job: Job) -> None:
        self.jobs[job.id] = job
        if job.state != "queued":
            self._charge(job, times=1)
            return
        self.queue.add(job)
        if job.kept is not None:
            self.kept.add(job.id)

    def _drop(self, id_: str) -> None:
        job = self.jobs.pop(id_, None)
        if job is None:
            return
        if (end := self._end_of(job)) is not None:
            del self.ends[bisect_left(self.ends, end)]
        if job.state != "queued":
            self._charge(job, times=-1)
            return
        self.queue.remove(job)
        self.kept.discard(id_)

    def _end_of(self, job: Job) -> tuple[float, str] | None:
        """When a running job is first expected to end, and its id; None = nothing tells."""
        ends = expected_ends(job, self.policy)
        return (ends[0], job.id) if ends and job.state == "running" else None

    def upcoming_ends(self) -> Iterator[tuple[float, str]]:
        """When running jobs are expected to end, earliest first: as predicted, and once that has passed by their time
        limit. Not before now; those of which nothing is known are left out."""
        overdue = bisect_left(self.ends, (self.now, chr(0x10FFFF)))
        late = [(self.expected_end(self.jobs[id_]), id_) for _, id_ in self.ends[:overdue]]
        return heapq.merge(sorted(entry for entry in late if entry[0] < inf), self.ends[overdue:])

    def expected_end(self, job: Job) -> float:
        """When a running job is expected to end; not before now. Infinite if nothing tells."""
        ends = expected_ends(job, self.policy)
        if not ends or (ends[-1] <= self.now and time_limit_of(job, self.policy) is None):
            return inf
        return max(self.now, next((end for end in ends if end > self.now), ends[-1]))

    def _charge(self, job: Job, *, times: int) -> None:
        load = self.load(job, states_of(job))
        self.free[:, load.columns] -= times * load.amounts
        self.use.charge(load.tenant, load.demand, times)
        if job.array is not None:
            self.array_jobs[job.array.id] += times
        if job.state == "stopping" and times > 0:
            self.stopping[job.id] = job
        else:
            self.stopping.pop(job.id, None)
        if job.state == "running" and times > 0:
            gpu_type = self.gpu_type_of(job, Seat(gpu_type=job.gpu_type, placement=job.placement))
            running = Running(job, load, int(load.amounts[GPUS].sum()), gpu_type)
            self.running[job.id] = self.of_tenant.setdefault(job.tenant, {})[job.id] = running
            if job.min_replicas is not None or job.max_replicas is not None:
                self.elastic[job.id] = running
        else:
            self.elastic.pop(job.id, None)
            self.running.pop(job.id, None)
            self.of_tenant.get(job.tenant, {}).pop(job.id, None)

    def is_lost(self, running: Running) -> bool:
        """Is it on a lost node, so that stopping it frees nothing before the node is back?"""
        return self.is_on_lost(running.job)

    def is_on_lost(self, job: Job) -> bool:
        """The same of any job that has a place."""
        return any(item.node in self.nodes and self.nodes[item.node].state == "lost" for item in job.placement)

    def load(self, job: Job, states: Sequence[Seat]) -> Load:
        """What a job takes that has these states: the largest of them, on each node and of each resource."""
        columns, replicas = self.table.columns_of(_largest([spread(s.placement) for s in states]))
        amounts = np.outer(amounts_of(shape_of(job)), np.array(replicas, dtype=np.int64))
        account = self.account(job.tenant, job.id)
        return Load(job.tenant, account, self.demand(job, states), columns, replicas, amounts)

    def account(self, tenant: str, job: str) -> str:
        """Jobs of one account may share a node, as far as `policy.share_nodes` cares."""
        return {"all": "", "tenant": self.forest.branch(tenant), "none": job}[self.policy.share_nodes]

    def demand(self, job: Job, states: Iterable[Seat]) -> Demand:
        """What counts against quotas: of each resource the largest of the states."""
        amounts = [dict(shape_of(job).demand(self.gpu_type_of(job, s), s.placed)) for s in states]
        return tuple(_largest(amounts).items())

    def gpu_type_of(self, job: Job, seat: Seat) -> str | None:
        """As given, the only one that the job names, or that of the node that it is on. None = CPU job, or unknown."""
        if not job.gpus_per_replica:
            return None
        if seat.gpu_type is not None:
            return seat.gpu_type
        if len(job.gpu_types) == 1:
            return job.gpu_types[0]
        on = sorted(p.node for p in seat.placement if p.node in self.nodes)
        return self.nodes[on[0]].gpu_type if on else None


def expected_ends(job: Job, policy: Policy) -> list[float]:
    """When a job that has started is expected to end: as predicted for the number of its replicas, then by its time
    limit; either may be missing."""
    if job.started_at is None:
        return []
    limit_s = time_limit_of(job, policy)
    by_limit = [] if limit_s is None else [job.started_at + limit_s]
    if job.predicted_s is None:
        return by_limit
    left_s = max(0.0, job.predicted_s - job.done_s) * progress(job, job.replicas) / progress(job, job.placed)
    predicted = job.started_at + left_s
    return [predicted, *by_limit] if not by_limit or predicted < by_limit[0] else by_limit


def states_of(job: Job) -> list[Seat]:
    """What a running or stopping job takes: where it is, and where it goes on."""
    here = Seat(gpu_type=job.gpu_type, placement=job.placement)
    return [here] if job.next is None else [here, job.next]


def shape_of(job: Job) -> Shape:
    """What one replica of it takes."""
    return Shape(job.gpus_per_replica, job.cpus_per_replica, job.memory_gib_per_replica)


def _largest(maps: list[dict[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for amounts in maps:
        for name, amount in amounts.items():
            out[name] = max(out.get(name, 0), amount)
    return out
