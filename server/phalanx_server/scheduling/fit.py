"""Owns the question whether nodes have room for a gang: how many of its replicas each could take, now or when empty.

Refuses to choose among nodes that do (`place`), and to know quotas and the queue. A replica never spans nodes; a gang
fits in a domain when all of its replicas do, at once, and its slices each within a domain of their own level.
"""

from weakref import WeakKeyDictionary

import numpy as np

from phalanx_server.domain.resources import Shape
from phalanx_server.scheduling.nodes import Amounts, Mask, NodeTable, amounts_of, usable
from phalanx_server.scheduling.order import Ask
from phalanx_server.scheduling.topology import rooms_by_depth, rule_of


def room(free: Amounts, shape: Shape, most: int) -> Amounts:
    """How many replicas of a shape each node has room for, counted up to `most`. Over-committed nodes have none."""
    counts = np.full(free.shape[1], most, dtype=np.int64)
    for row, each in zip(free, amounts_of(shape), strict=True):
        if each:
            np.minimum(counts, row // each, out=counts)
    return np.maximum(counts, 0, out=counts)


def usable_by(free: Amounts, table: NodeTable, ask: Ask) -> Amounts:
    """What of the free amounts the ask's replicas may take."""
    return usable(free, table.total, by_cpu_jobs=ask.shape.is_cpu_only)


def rooms(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, *, replicas: int | None = None
) -> list[int]:
    """For how many of its replicas, or of so many, there is room on the allowed nodes of each domain that the gang may
    not leave: of the level that it requires, else of the pools. Whole slices count. `free` is what it may use."""
    most = ask.replicas if replicas is None else replicas
    columns = [d.columns for d in table.domains(gpu_type)]
    counts = [room(free[:, c], ask.shape, most) * allowed[c] for c in columns]
    if ask.topology is None:
        return [int(c.sum()) for c in counts]
    rule = rule_of(ask.topology, table.levels)
    trees = zip(table.trees(gpu_type), columns, counts, strict=True)
    found = [rooms_by_depth(tree, rule, c[tree.columns - at.start])[rule.bound] for tree, at, c in trees]
    return [n // ask.step * ask.step for ns in found for n in ns.tolist()]


def holds_gang(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, *, replicas: int | None = None
) -> bool:
    """Has one domain room for the whole gang, or for so many replicas, on the allowed nodes?"""
    wanted = ask.replicas if replicas is None else replicas
    if wanted % ask.step:
        return False
    return max(rooms(table, free, ask, gpu_type, allowed, replicas=wanted), default=0) >= wanted


class EmptyCluster:
    """What could be held if no other job ran, also by CPU jobs of what free GPUs keep from them: GPUs in use do not.

    Answers are remembered; when nodes change it is made anew.
    """

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self._largest: WeakKeyDictionary[Ask, dict[str | None, int]] = WeakKeyDictionary()
        self._accepting: WeakKeyDictionary[Ask, Mask] = WeakKeyDictionary()

    def largest_gang(self, ask: Ask, gpu_type: str | None) -> int:
        """For how many of the least number of replicas there is room, counting nodes of any state."""
        by_type = self._largest.setdefault(ask, {})
        if gpu_type not in by_type:
            total, accepted, least = self._table.total, self._table.of_types(ask.gpu_types), ask.least_replicas
            found = rooms(self._table, total, ask, gpu_type, accepted, replicas=least)
            by_type[gpu_type] = min(least, max(found, default=0))
        return by_type[gpu_type]

    def accepting(self, ask: Ask) -> Mask:
        """The nodes that take new jobs and are of a type that it accepts; without those that it avoids, as long as the
        others could hold the gang when empty."""
        if ask not in self._accepting:
            wanted = self._table.ready & self._table.of_types(ask.gpu_types)
            others = wanted & ~self._table.mask_of(ask.avoid_nodes)
            self._accepting[ask] = others if ask.avoid_nodes and self._ever_holds(ask, others) else wanted
        return self._accepting[ask]

    def _ever_holds(self, ask: Ask, allowed: Mask) -> bool:
        types = [None] if ask.shape.is_cpu_only else ask.gpu_types or self._table.gpu_types
        return any(holds_gang(self._table, self._table.total, ask, t, allowed) for t in types)
