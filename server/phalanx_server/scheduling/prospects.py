"""Owns the quick look whether it is worth a try to make room for a job: what others could give up at the very most.

Refuses to say more than "perhaps": whatever it turns down could not be helped, and most of what waits in a busy cluster
is turned down here, at a few additions each.
"""

from bisect import bisect_left
from itertools import accumulate

from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.evictable import ANY
from phalanx_server.scheduling.nodes import GPUS
from phalanx_server.scheduling.order import Bid, ClassKey
from phalanx_server.scheduling.possible import Option
from phalanx_server.scheduling.yielding import places_of

Resources = tuple[str, ...]


def may_gather(draft: Draft, key: ClassKey, option: Option) -> bool:
    """Is so much free in all that it would fit if that lay together?"""
    return _free_gpus(draft, option.gpu_type) >= _wanted(key)


def is_promising(draft: Draft, bid: Bid, option: Option) -> bool:
    """May enough be free once all has given way that the job could ask for? Without regard to where it is."""
    key = bid.key
    missing, kind = _wanted(key) - _free_gpus(draft, option.gpu_type), option.gpu_type
    if missing <= 0:  # what is missing may be anything that it takes: anybody may have it
        missing = 1
        if key.ask.shape.cpus or key.ask.shape.memory_gib or option.least_demand[1:]:
            kind = ANY
    given = _own_gpus(draft, bid, kind)
    if draft.world.elastic:
        given += _lent_gpus(draft, kind)
    return given >= missing or given + _others_gpus(draft, key, option, kind, given) >= missing


def _wanted(key: ClassKey) -> int:
    return key.ask.least_replicas * key.ask.shape.gpus


def _free_gpus(draft: Draft, gpu_type: str | None) -> int:
    """What was free when it was first asked for: starts only take from it."""
    question = ("free gpus", gpu_type)
    if question not in draft.memo:
        mask = draft.table.of_type(gpu_type) & draft.table.ready
        draft.memo[question] = int(draft.soon.free[GPUS].clip(min=0)[mask].sum())
    return int(draft.memo[question])


def _lent_gpus(draft: Draft, gpu_type: str | None) -> int:
    """What elastic jobs have above their minimum; of a CPU job, 1 for each."""
    if not draft.world.policy.elastic:
        return 0
    question = ("lent", gpu_type)
    if question not in draft.memo:
        lent = 0
        for running in draft.world.elastic.values():
            job = running.job
            if gpu_type in (running.gpu_type, ANY) and job.id not in draft.disturbed:
                spare = job.placed - (job.min_replicas or job.replicas)
                lent += spare * max(1, job.gpus_per_replica)
        draft.memo[question] = lent
    return int(draft.memo[question])


def _own_gpus(draft: Draft, bid: Bid, gpu_type: str | None) -> int:
    """What its tenant's jobs have that it may evict."""
    key, forest = bid.key, draft.world.forest
    rule = forest.tenants[forest.number[key.tenant]].preemption.within_tenant
    if rule == "never":
        return 0
    most = key.priority if rule == "lower_or_newer_equal" else key.priority - 1
    return draft.evictable.gpus(key.tenant, gpu_type, most) + _longer_gpus(draft, bid, gpu_type)


def _longer_gpus(draft: Draft, bid: Bid, gpu_type: str | None) -> int:
    """What jobs of its tenant and priority have that yield to it because they need longer."""
    places = places_of(draft, bid.key.tenant)
    if not places:
        return 0
    question = ("longer", bid.key.tenant, gpu_type, bid.key.priority)
    if question not in draft.memo:
        mine = [(places[id_], r) for _, r in draft.evictable.in_order(bid.key.tenant) if (id_ := r.job.id) in places]
        alike = [(p, r) for p, r in mine if r.job.priority == bid.key.priority and gpu_type in (r.gpu_type, ANY)]
        rows = sorted((-place.most_s, r.gpus or 1) for place, r in alike)
        draft.memo[question] = [at for at, _ in rows], [0, *accumulate(gpus for _, gpus in rows)]
    longest_first, sums = draft.memo[question]
    return int(sums[bisect_left(longest_first, -bid.behind_s)])


# ------------------------------------------------------------------ what others have


def _others_gpus(draft: Draft, key: ClassKey, option: Option, kind: str | None, given: int) -> int:
    """What others have who borrow what it asks for, if it could have a right to that. `given`: what its own side could
    free of its quota."""
    world, use, forest = draft.world, draft.soon.use, draft.world.forest
    rules = forest.tenants[forest.number[key.tenant]].preemption
    if rules.reclaim == "never":
        return 0
    way = forest.way_up(key.tenant)
    limited = option.least_demand
    asked = tuple([r for r, _ in limited])
    if rules.borrow is not None or (world.policy.fair_sharing and (given or _is_behind(draft, key, option, asked))):
        return sum(_borrowed(draft, forest.parent[a], a, asked, kind) for a in way[:-1])
    # It may take back what is its side's own, if it ends within that.
    taken = 0
    for a in way[:-1]:
        for resource, amount in limited:
            over = use.excess(a, resource)
            if over >= 0 or (resource == option.gpu_type and over + amount > given + taken):
                break
        else:
            taken += _borrowed(draft, forest.parent[a], a, asked, kind)
    return taken


def _borrowed(draft: Draft, parent: int, me: int, asked: Resources, gpu_type: str | None) -> int:
    """What the children of a tenant, but for one, would give up at most."""
    use, question = draft.soon.use, ("borrowed", parent, asked, gpu_type)
    known = draft.memo.get(question)
    if known is None or known[0] != use.changes[parent]:
        by_child = {b: _most_of(draft, b, asked, gpu_type) for b in _borrowing(draft, parent, asked)}
        known = draft.memo[question] = (use.changes[parent], by_child, sum(by_child.values()))
    _, by_child, total = known
    return int(total - by_child.get(me, 0))


def _borrowing(draft: Draft, parent: int, asked: Resources) -> list[int]:
    use = draft.soon.use
    return [b for b in draft.world.forest.children[parent] if any(use.excess(b, r) > 0 for r in asked)]


def _most_of(draft: Draft, i: int, asked: Resources, gpu_type: str | None) -> int:
    """What the subtree of tenant number `i` would give up at most: of what is asked for, nobody is evicted any more who
    does not borrow. (Where somebody in it does not lend, evicting that one may leave what the subtree borrows.)"""
    gpus, largest = draft.evictable.gpus_below(i, gpu_type)
    if asked != (gpu_type,) or draft.world.forest.limits[asked[0]].keeps[i]:
        return gpus
    return min(gpus, draft.soon.use.excess(i, asked[0]) - 1 + largest)


def _is_behind(draft: Draft, key: ClassKey, option: Option, asked: Resources) -> bool:
    """Would its side have no more, with the job started, than somebody else's has that borrows?"""
    use, forest = draft.soon.use, draft.world.forest
    for a in forest.way_up(key.tenant)[:-1]:
        mine = use.share_with(a, key.tenant, option.least_demand)
        if any(mine <= use.share(b) for b in _borrowing(draft, forest.parent[a], asked) if b != a):
            return True
    return False
