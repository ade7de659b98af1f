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


def room_where(free: Amounts, shape: Shape, most: int, allowed: Mask) -> Amounts:
    """The same, and none where it is not allowed."""
    counts = np.zeros(free.shape[1], dtype=np.int64)
    columns = np.flatnonzero(allowed)
    counts[columns] = room(free[:, columns], shape, most)
    return counts


def usable_by(free: Amounts, table: NodeTable, ask: Ask) -> Amounts:
    """What of the free amounts the ask's replicas may take."""
    return usable(free, table.total, by_cpu_jobs=ask.shape.is_cpu_only)


def most_replicas(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, *, at_most: int
) -> int:
    """How large the gang could be, up to so many replicas: in whole slices, on the allowed nodes of one domain of the
    level that it requires. `free` is what it may use."""
    found = 0
    for number, domain in enumerate(table.domains(gpu_type)):
        columns = domain.columns
        counts = room_where(free[:, columns], ask.shape, at_most, allowed[columns])
        if ask.topology is None:
            found = max(found, int(counts.sum()))
            continue
        tree, rule = table.trees(gpu_type)[number], rule_of(ask.topology, table.levels)
        there = rooms_by_depth(tree, rule, counts[tree.columns - columns.start])
        found = max(found, int(there[rule.bound].max()))
    return min(found, at_most) // ask.step * ask.step


def holds_gang(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, *, replicas: int | None = None
) -> bool:
    """Has one domain room for the whole gang, or for so many replicas, on the allowed nodes?"""
    wanted = ask.replicas if replicas is None else replicas
    return most_replicas(table, free, ask, gpu_type, allowed, at_most=wanted) == wanted


class EmptyCluster:
    """What could be held if no other job ran, also by CPU jobs of what free GPUs keep from them: GPUs in use do not.

    Answers are remembered; when what nodes have changes it is made anew.
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
            by_type[gpu_type] = most_replicas(self._table, total, ask, gpu_type, accepted, at_most=least)
        return by_type[gpu_type]

    def accepting(self, ask: Ask) -> Mask:
        """The nodes that take new jobs and are of a type that it accepts; without those that it avoids, as long as the
        others could hold the gang when empty."""
        if ask not in self._accepting:
            wanted = self._table.ready & self._table.of_types(ask.gpu_types)
            others = wanted & ~self._table.mask_of(ask.avoid_nodes)
            self._accepting[ask] = others if ask.avoid_nodes and self._ever_holds(ask, others) else wanted
        return self._accepting[ask]

    def forget_states(self) -> None:
        """Nodes are in other states than before."""
        self._accepting.clear()

    def _ever_holds(self, ask: Ask, allowed: Mask) -> bool:
        types = [None] if ask.shape.is_cpu_only else ask.gpu_types or self._table.gpu_types
        return any(holds_gang(self._table, self._table.total, ask, t, allowed) for t in types)
