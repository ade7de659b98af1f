"""Owns the quick look whether it is worth a try to make room for a job: what others could give up at the very most.

Refuses to say more than "perhaps": whatever it turns down could not be helped, and most of what waits in a busy cluster
is turned down here, once for all jobs of a tenant that are alike.
"""

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
    wanted = key.ask.least_replicas * key.ask.shape.gpus - _free_gpus(draft, option.gpu_type)
    given += _others_gpus(draft, key, option)
    return given > 0 and (not option.gpu_type or given >= wanted)


def _free_gpus(draft: Draft, gpu_type: str | None) -> int:
    mask = draft.table.of_type(gpu_type) & draft.table.ready
    return int(draft.soon.free[GPUS].clip(min=0)[mask].sum())


def _evictable(draft: Draft, gpu_type: str | None) -> list[int]:
    """By tenant number, what the jobs of its subtree have that somebody might evict; 1 for a CPU job."""
    question = ("evictable gpus", gpu_type)
    if question not in draft.memo:
        forest, now = draft.world.forest, draft.world.now
        below = [0] * len(forest.tenants)
        for r in draft.world.running.values():
            is_candidate = r.gpu_type == gpu_type and r.job.preemptible and r.job.id not in draft.disturbed
            if is_candidate and r.may_be_disturbed(now, even_protected=draft.even_protected):
                below[forest.number[r.job.tenant]] += max(1, r.gpus)
        for i in forest.upward:
            if (above := forest.parent[i]) >= 0:
                below[above] += below[i]
        draft.memo[question] = below
    return draft.memo[question]


def _others_gpus(draft: Draft, key: ClassKey, option: Option) -> int:
    """What others have who borrow what it asks for, if it could have a right to that."""
    borrowing = _may_evict_others(draft, key, option)
    evictable = _evictable(draft, option.gpu_type) if borrowing else []
    return sum(evictable[b] for _, b in borrowing)


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
            if r.gpu_type == gpu_type
            and r.job.priority <= most
            and r.job.preemptible
            and r.job.id not in draft.disturbed
            and r.may_be_disturbed(world.now, even_protected=draft.even_protected)
        )
    return float(draft.memo[question])


def _may_evict_others(draft: Draft, key: ClassKey, option: Option) -> list[tuple[int, int]]:
    """The sides in its tree that borrow what it asks for, each with its own side, if it could have a right to that."""
    world, use = draft.world, draft.soon.use
    forest = world.forest
    rules = forest.tenants[forest.number[key.tenant]].preemption
    if rules.reclaim == "never":
        return []
    way = forest.way_up(key.tenant)
    demand = key.ask.shape.demand(option.gpu_type, key.ask.least_replicas)
    limited = [(r, n) for r, n in demand if use.left(way[0], r) is not None]
    below = [a for a in way[:-1] if all(use.excess(a, r) < 0 for r, _ in limited)]
    if not below and rules.borrow is None and not world.policy.fair_sharing:
        return []
    asked = tuple(r for r, _ in limited)
    borrowing = [(a, b) for a in way[:-1] for b in _borrowing(draft, forest.parent[a], asked) if b != a]
    if rules.borrow is not None or not borrowing:
        return borrowing
    if world.policy.fair_sharing and _is_behind(draft, key, option, borrowing):
        return borrowing
    return [(a, b) for a, b in borrowing if a in below]


def _borrowing(draft: Draft, parent: int, resources: tuple[str, ...]) -> list[int]:
    """The children of a tenant that borrow one of these resources. Starts only add to them: looked at once, and again
    when room was made."""
    question = ("borrowing", parent, resources)
    if question not in draft.memo:
        use = draft.soon.use
        children = draft.world.forest.children[parent]
        draft.memo[question] = [b for b in children if any(use.excess(b, r) > 0 for r in resources)]
    return draft.memo[question]


def _is_behind(draft: Draft, key: ClassKey, option: Option, borrowing: list[tuple[int, int]]) -> bool:
    """Would its side have less, with the job started, than somebody else's has?"""
    use = draft.soon.use
    demand = key.ask.shape.demand(option.gpu_type, key.ask.least_replicas)
    before = {b: use.share(b) for _, b in borrowing}
    use.charge(key.tenant, demand)
    is_behind = any(use.share(a) < before[b] for a, b in borrowing)
    use.charge(key.tenant, demand, -1)
    return is_behind
