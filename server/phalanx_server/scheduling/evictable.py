"""Owns which running jobs somebody might evict, in the order of victims, and how many GPUs they have by tenant.

Refuses to know who may evict whom. It is made once in a pass, and kept up as jobs are made to stop.
"""

from bisect import bisect_left
from collections.abc import Collection

from phalanx_server.scheduling.world import Running, World

Order = tuple[int, float, float, str]
"""Priority, loss, started last, id."""

ANY = "*"
"""Instead of a GPU type: jobs of all types, and CPU jobs."""

_Kind = tuple[str, str | None]


class Evictable:
    """The preemptible jobs that run and are not `disturbed`; of those inside their minimum run time only
    `even_protected`, and of those on lost nodes none, for that would free nothing."""

    def __init__(self, world: World, disturbed: Collection[str], *, even_protected: bool) -> None:
        self._world = world
        self._gpus: dict[_Kind, list[tuple[int, int]]] = {}
        self._of_tenant: dict[str, dict[str, Running]] = {}
        self._sorted: dict[str, list[tuple[Order, Running]]] = {}
        self._above: dict[str | None, tuple[list[int], list[int]]] = {}
        has_lost = bool((world.table.states == "lost").any())
        for id_, r in world.running.items():
            if not r.job.preemptible or id_ in disturbed or (has_lost and world.is_lost(r)):
                continue
            if r.may_be_disturbed(world.now, even_protected=even_protected):
                self._of_tenant.setdefault(r.job.tenant, {})[id_] = r
                for kind in (r.gpu_type, ANY):
                    self._gpus.setdefault((r.job.tenant, kind), []).append((r.job.priority, r.gpus or 1))

    def order(self, running: Running) -> Order:
        """Its place among the victims; the smallest is first."""
        job, world = running.job, self._world
        return job.priority, running.loss(world.now, world.policy.restart_s), -(job.started_at or 0.0), job.id

    def in_order(self, tenant: str) -> list[tuple[Order, Running]]:
        """The jobs of a tenant in the order of victims. Not to be changed."""
        if tenant not in self._sorted:
            self._sorted[tenant] = sorted((self.order(r), r) for r in self._of_tenant.get(tenant, {}).values())
        return self._sorted[tenant]

    def gpus(self, tenant: str, gpu_type: str | None, most: int) -> int:
        """The GPUs of a tenant's jobs up to a priority; 1 for each CPU job."""
        return sum(gpus for priority, gpus in self._gpus.get((tenant, gpu_type), ()) if priority <= most)

    def gpus_below(self, i: int, gpu_type: str | None) -> tuple[int, int]:
        """(the GPUs of the jobs in the subtree of tenant number `i`, at least those of the largest of them)."""
        if gpu_type not in self._above:
            self._above[gpu_type] = self._sum_up(gpu_type)
        gpus, largest = self._above[gpu_type]
        return gpus[i], largest[i]

    def drop(self, running: Running) -> None:
        """It is made to stop."""
        job, has = running.job, running.gpus or 1
        if self._of_tenant.get(job.tenant, {}).pop(job.id, None) is None:
            return
        for kind in (running.gpu_type, ANY):
            self._gpus[job.tenant, kind].remove((job.priority, has))
            for i in self._world.forest.way_up(job.tenant) if kind in self._above else ():
                self._above[kind][0][i] -= has
        if job.tenant in self._sorted:
            jobs = self._sorted[job.tenant]
            del jobs[bisect_left(jobs, (self.order(running),))]

    def _sum_up(self, gpu_type: str | None) -> tuple[list[int], list[int]]:
        forest = self._world.forest
        gpus, largest = [0] * len(forest.tenants), [0] * len(forest.tenants)
        for (tenant, of), jobs in self._gpus.items():
            if of == gpu_type and jobs:
                gpus[forest.number[tenant]] = sum(has for _, has in jobs)
                largest[forest.number[tenant]] = max(has for _, has in jobs)
        for i in forest.upward:
            if (above := forest.parent[i]) >= 0:
                gpus[above] += gpus[i]
                largest[above] = max(largest[above], largest[i])
        return gpus, largest
