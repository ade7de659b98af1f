"""Owns how much each elastic job should have of what they all hold and what is idle.

Refuses to know nodes and quotas, and to change anything. GPUs are handed out one after the other, each to whom it makes
faster by the largest factor: proportional fairness (Kelly, Maulloo and Tan, 1998), as Pollux (OSDI'21) and Shockwave
(NSDI'23) measure an allocation. A job that is expected to be done soon counts for more, by the root of the work that is
left: so the mean completion time gains as it would from the shortest first, but nobody is left with the minimum alone.
(Berg, Vesilo and Harchol-Balter, heSRPT, 2020, show that this mixture is the best one where speed grows less than
in proportion to the GPUs, as it always does.)
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from phalanx_server.scheduling.snapshot import Job
from phalanx_server.scheduling.speedup import best_gain, progress, relative_gain
from phalanx_server.scheduling.world import World

NEARNESS = 0.5
"""The power of the work left by which a job counts for less. 0 = all alike, 1 = nearly the shortest first."""

_CHUNK = 4
"""A job is given a quarter of what it has at a time, so that large ones take few steps."""


@dataclass(frozen=True, slots=True)
class Stake:
    """An elastic job as far as its share goes: `replicas` is what it holds, or will hold once it has been resized."""

    job: Job
    replicas: int
    least: int
    most: int
    step: int
    left_s: float
    """For how long it is expected to run with one replica."""
    weight: float

    @property
    def gpus(self) -> int:
        """Of one replica; a replica without GPUs counts as one."""
        return max(1, self.job.gpus_per_replica)

    def gain_per_gpu(self, replicas: int) -> tuple[float, int]:
        """What one more GPU is worth to it when it has so many replicas, and up to how many that holds."""
        gain, size = best_gain(self.job, replicas, self.most, self.step)
        return self.weight * gain / self.gpus, size

    def worth(self, fewer: int, more: int) -> float:
        """What it is worth to it to have more, the restart left out."""
        return self.weight * relative_gain(self.job, fewer, more)

    def restart_cost(self, replicas: int, restart_s: float) -> float:
        """What a restart costs it, in the same measure: its part of the time that is left."""
        left_s = self.left_s / progress(self.job, replicas)
        return inf if left_s <= restart_s else self.weight * restart_s / left_s


def stake_of(world: World, job: Job, replicas: int, least: int, step: int) -> Stake:
    """The stake of a job that runs, stops to go on, or has just been started."""
    left_s = max(_left_s(world, job), world.policy.restart_s, 1.0)
    most = max(replicas, job.max_replicas or 0)
    weight = (left_s * max(1, job.gpus_per_replica)) ** -NEARNESS
    return Stake(job, replicas, least, most, step, left_s, weight)


def _left_s(world: World, job: Job) -> float:
    """For how long the job would still run with one replica. Of which nothing is known, or that has outlived it, is
    taken to need as long again (Harchol-Balter and Downey, SIGMETRICS 1996)."""
    if job.started_at is None:
        known_s = job.predicted_s if job.predicted_s is not None and job.predicted_s > job.done_s else 2 * job.done_s
        return (known_s - job.done_s) * progress(job, job.replicas)
    speed = progress(job, job.placed)
    ends_at = world.expected_end(job)
    if ends_at < inf:
        return (ends_at - world.now) * speed
    return (world.now - job.started_at) * speed + job.done_s * progress(job, job.replicas)


def fair_shares(stakes: Iterable[Stake], gpus: int) -> Mapping[str, int]:
    """So many replicas each job should have of so many GPUs, what they hold included; by its id."""
    of = {stake.job.id: stake for stake in stakes}
    shares = {id_: stake.least for id_, stake in of.items()}
    gpus -= sum(stake.least * stake.gpus for stake in of.values())
    queue = [(-stake.gain_per_gpu(stake.least)[0], id_) for id_, stake in of.items()]
    heapq.heapify(queue)
    while queue and gpus > 0:
        _, id_ = heapq.heappop(queue)
        stake, has = of[id_], shares[id_]
        _, size = stake.gain_per_gpu(has)
        more = min(size - has, max(has // _CHUNK, 1), gpus // stake.gpus) // stake.step * stake.step
        more = more or min(stake.step, size - has)
        if not more or more * stake.gpus > gpus:
            continue
        shares[id_] += more
        gpus -= more * stake.gpus
        heapq.heappush(queue, (-stake.gain_per_gpu(has + more)[0], id_))
    return {id_: _no_slower(of[id_], share) for id_, share in shares.items()}


def _no_slower(stake: Stake, replicas: int) -> int:
    """Less, where what is short of the next good size is no faster than what is below."""
    while replicas - stake.step >= stake.least and stake.worth(replicas - stake.step, replicas) <= 0:
        replicas -= stake.step
    return replicas
