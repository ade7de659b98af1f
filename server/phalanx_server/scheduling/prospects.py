"""Owns the quick look whether it is worth a try to make room for a job: what others could give up at the very most.

Refuses to say more than "perhaps": whatever it turns down could not be helped, and most of what waits in a busy cluster
is turned down here, once for all jobs of a tenant that are alike.
"""

from math import inf

from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.nodes import GPUS
from phalanx_server.scheduling.order import ClassKey
from phalanx_server.scheduling.possible import Option


def is_promising(draft: Draft, key: ClassKey, option: Option) -> bool:
    """May enough be free once all has given way that the job could ask for? Without regard to where it is."""
    question = ("promising", key.tenant, key.priority, key.ask, option.gpu_type)
    if question not in draft.memo:
        draft.memo[question] = _is_promising(draft, key, option)
    return bool(draft.memo[question])


def _is_promising(draft: Draft, key: ClassKey, option: Option) -> bool:
    given = _lent_gpus(draft, option.gpu_type) + _own_gpus(draft, key, option.gpu_type)
    if given == 0 or not option.gpu_type:
        given = inf if given or _may_evict_others(draft, key, option) else 0
    elif given < inf and _may_evict_others(draft, key, option):
        given = inf
    if not given:
        return False
    if not option.gpu_type:
        return True
    return _free_gpus(draft, option.gpu_type) + given >= key.ask.least_replicas * key.ask.shape.gpus


def _free_gpus(draft: Draft, gpu_type: str) -> int:
    mask = draft.table.of_type(gpu_type) & draft.table.ready
    return int(draft.soon.free[GPUS].clip(min=0)[mask].sum())


def _lent_gpus(draft: Draft, gpu_type: str | None) -> float:
    """What elastic jobs have above their minimum; of a CPU job, infinite if there is anything."""
    if not draft.world.policy.elastic:
        return 0
    question = ("lent", gpu_type)
    if question not in draft.memo:
        lent = 0
        for running in draft.world.elastic.values():
            job = running.job
            if running.gpu_type == gpu_type and job.id not in draft.disturbed:
                spare = sum(item.replicas for item in job.placement) - (job.min_replicas or job.replicas)
                lent += spare * max(1, job.gpus_per_replica)
        draft.memo[question] = lent
    return float(draft.memo[question])


def _own_gpus(draft: Draft, key: ClassKey, gpu_type: str | None) -> float:
    """What its tenant's jobs have that it may evict."""
    world = draft.world
    rule = world.forest.tenants[world.forest.number[key.tenant]].preemption.within_tenant
    if rule == "never":
        return 0
    most = key.priority if rule == "lower_or_newer_equal" else key.priority - 1
    question = ("own", key.tenant, gpu_type, most)
    if question not in draft.memo:
        mine = world.of_tenant.get(key.tenant, {}).values()
        draft.memo[question] = sum(
            max(1, r.gpus)
            for r in mine
            if r.gpu_type == gpu_type and r.job.priority <= most and r.job.preemptible and r.job.id not in draft.disturbed
        )
    return float(draft.memo[question])


def _may_evict_others(draft: Draft, key: ClassKey, option: Option) -> bool:
    """Does anybody in its tree borrow what it asks for, and could it have a right to that?"""
    world, use = draft.world, draft.soon.use
    forest = world.forest
    rules = forest.tenants[forest.number[key.tenant]].preemption
    if rules.reclaim == "never":
        return False
    way = forest.way_up(key.tenant)
    demand = key.ask.shape.demand(option.gpu_type, key.ask.least_replicas)
    limited = [(r, n) for r, n in demand if use.left(way[0], r) is not None]
    siblings = [(a, b) for a in way[:-1] for b in forest.children[forest.parent[a]] if b != a]
    borrowing = [(a, b) for a, b in siblings if any(use.excess(b, r) > 0 for r, _ in limited)]
    if not borrowing:
        return False
    if rules.borrow is not None or any(all(use.excess(a, r) < 0 for r, _ in limited) for a, _ in borrowing):
        return True
    return world.policy.fair_sharing and _is_behind(draft, key, option, borrowing)


def _is_behind(draft: Draft, key: ClassKey, option: Option, borrowing: list[tuple[int, int]]) -> bool:
    """Would its side have less, with the job started, than somebody else's has?"""
    use = draft.soon.use
    demand = key.ask.shape.demand(option.gpu_type, key.ask.least_replicas)
    before = {b: use.share(b) for _, b in borrowing}
    use.charge(key.tenant, demand)
    is_behind = any(use.share(a) < before[b] for a, b in borrowing)
    use.charge(key.tenant, demand, -1)
    return is_behind
