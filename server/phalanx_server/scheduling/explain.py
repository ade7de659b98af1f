"""Owns the finding of the reason why a job cannot start now: the first, by precedence, that would hold by itself.

Refuses to decide and to word it (`domain.reason` does). Where a job accepts several GPU types, the reason told is the
one that comes last in the order of precedence: to lift that one alone is enough.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from phalanx_server.domain.reason import (
    Apart,
    Explanation,
    Fragmented,
    HoldReason,
    InMaintenance,
    NoRoom,
    OverQuota,
    Reserved,
)
from phalanx_server.domain.resources import CPU, MEMORY, Demand
from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.fit import holds_gang, room
from phalanx_server.scheduling.nodes import Amounts, Mask, amounts_of
from phalanx_server.scheduling.order import Ask, ClassKey, sized
from phalanx_server.scheduling.topology import rooms_by_depth, rule_of

_PRECEDENCE = {reason: i for i, reason in enumerate(HoldReason)}


def explain_quota(draft: Draft, tenant: str, demand: Demand) -> Explanation:
    """Why a demand that is not in quota is not."""
    lack = draft.now.use.shortage(tenant, demand)
    if lack is None and draft.ahead:
        return Reserved(tuple(draft.ahead))
    lack = lack or draft.soon.use.shortage(tenant, demand)
    assert lack is not None, "it is over a quota now or soon"
    return OverQuota(resource=lack.resource, asks=lack.asks, leaves=lack.leaves, limiter=lack.limiter)


def explain_nodes(draft: Draft, key: ClassKey, gpu_type: str | None) -> Explanation:
    """Why a gang that is in quota finds no place on the nodes of a GPU type."""
    table, ask = draft.table, sized(key.ask, key.ask.least_replicas)
    accepting, allowed = draft.accepting(key, (draft.now,)), draft.allowed(key, (draft.now,))
    free = draft.usable(ask, (draft.now,))
    if holds_gang(table, free, ask, gpu_type, allowed):
        if draft.ahead:
            return Reserved(tuple(draft.ahead))
        free, allowed = draft.usable(ask, (draft.soon,)), draft.allowed(key, (draft.soon,))
    if holds_gang(table, free, ask, gpu_type, accepting):
        return _maintenance(draft, key, gpu_type, free)
    empty = table.total
    if holds_gang(table, empty, ask, gpu_type, accepting) and not holds_gang(table, empty, ask, gpu_type, allowed):
        return _maintenance(draft, key, gpu_type, empty)
    return _room(draft, ask, gpu_type, free, allowed)


def _maintenance(draft: Draft, key: ClassKey, gpu_type: str | None, free: Amounts) -> InMaintenance:
    """The first window to end after which the gang has its place."""
    accepting, limit_s = draft.accepting(key, (draft.now,)), key.ask.run_limit_s
    for ends_at in draft.windows.ends:
        mask = accepting & draft.windows.clear(limit_s, at=ends_at)
        if holds_gang(draft.table, free, sized(key.ask, key.ask.least_replicas), gpu_type, mask):
            return InMaintenance(ends_at, limit_s)
    raise AssertionError("without any window it would have its place")


def _room(draft: Draft, ask: Ask, gpu_type: str | None, free: Amounts, allowed: Mask) -> Explanation:
    gang = ask.describe(gpu_type)
    names = (gpu_type or "gpu", CPU, MEMORY)
    everywhere = draft.table.of_type(gpu_type) & allowed
    for row_number, (name, each) in enumerate(zip(names, amounts_of(ask.shape).tolist(), strict=True)):
        row = free[row_number]
        have = int(np.maximum(row, 0)[everywhere].sum())
        if have < each * ask.replicas:
            idle = int(np.maximum(draft.now.free[row_number], 0)[everywhere].sum())
            kept = max(0, idle - have) if ask.shape.is_cpu_only else 0
            return NoRoom(gang=gang, resource=name, asks=each * ask.replicas, free=have, for_gpus=kept)
    counts = room(free, ask.shape, ask.replicas) * everywhere
    if counts.sum() >= ask.replicas:
        return _apart(draft, ask, gpu_type, free, allowed)
    return Fragmented(gang, replicas=ask.replicas, fit=int(counts.sum()))


def _apart(draft: Draft, ask: Ask, gpu_type: str | None, free: Amounts, allowed: Mask) -> Apart:
    """What the domain with the most room has, of the level that the gang may not leave."""
    resource = next(r for r, each in enumerate(amounts_of(ask.shape).tolist()) if each)
    rule = rule_of(ask.topology, draft.table.levels)
    best = (-1, -1)
    for tree in draft.table.trees(gpu_type):
        counts = (room(free, ask.shape, ask.replicas) * allowed)[tree.columns]
        amounts = (np.maximum(free[resource], 0) * allowed)[tree.columns]
        fits = rooms_by_depth(tree, rule, counts)[rule.bound]
        best = max(best, *zip(fits.tolist(), tree.of_nodes(amounts, rule.bound).tolist(), strict=True))
    return Apart(
        level=ask.bound,
        resource=(gpu_type or "gpu", CPU, MEMORY)[resource],
        asks=ask.replicas * int(amounts_of(ask.shape)[resource]),
        free=best[1],
        replicas=ask.replicas,
        fit=min(best[0], ask.replicas),
        slices=ask.slices,
        excluded=_excluded(draft, ask, gpu_type, allowed),
    )


def _excluded(draft: Draft, ask: Ask, gpu_type: str | None, allowed: Mask) -> tuple[tuple[str, int], ...]:
    """Domains of the level without a node that may take the job: (why the last of their nodes may not, how many), the
    most first."""
    table, rule = draft.table, rule_of(ask.topology, draft.table.levels)
    filters = (
        ("wrong type", table.of_type(gpu_type)),
        *((state, table.states != state) for state in ("lost", "draining", "cordoned")),
        ("avoided", draft.world.empty.accepting(ask)),
        ("in maintenance", draft.windows.clear(ask.run_limit_s)),
        ("used by others", allowed),
    )
    reasons: Counter[str] = Counter()
    for tree in table.trees(None):
        nodes = np.ones(len(tree.columns), dtype=np.bool_)
        open_before = len(tree.starts[rule.bound])
        for reason, mask in filters:
            nodes &= mask[tree.columns]
            still_open = int(np.count_nonzero(tree.of_nodes(nodes.astype(np.int64), rule.bound)))
            reasons[reason] += open_before - still_open
            open_before = still_open
    return tuple(sorted((+reasons).items(), key=lambda entry: (-entry[1], entry[0])))


def weakest(explanations: Sequence[Explanation]) -> Explanation:
    """Of one explanation per GPU type the one to tell."""
    return max(explanations, key=lambda e: _PRECEDENCE[e.reason])
