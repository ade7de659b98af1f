"""Owns the choice of nodes for a gang that fits: few nodes, and the tightest that will do.

Refuses to know quotas and the queue. Best fit keeps large holes whole for large gangs; a gang spreads over as few
nodes as possible, the fullest share first, its last node chosen by best fit. CPU jobs stay off nodes with GPUs while
they can. A job with a topology is placed by domains (`topology`).
"""

from dataclasses import dataclass

import numpy as np

from phalanx_server.scheduling.fit import room, room_where
from phalanx_server.scheduling.nodes import CPUS, GPUS, MEMORY, Amounts, Mask, NodeTable
from phalanx_server.scheduling.order import Ask
from phalanx_server.scheduling.snapshot import PlacementItem
from phalanx_server.scheduling.topology import MOST, Choice, Rooms, choose, rule_of

_BITS = 20
_MOST = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a gang goes: columns of the node table, and the replicas on each."""

    gpu_type: str | None
    columns: list[int]
    replicas: list[int]

    def placement(self, table: NodeTable) -> tuple[PlacementItem, ...]:
        """The same with the names of the nodes, sorted by name."""
        named = sorted((table.names[i], r) for i, r in zip(self.columns, self.replicas, strict=True))
        return tuple(PlacementItem(name, r) for name, r in named)


def find_spot(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, *, replicas: int | None = None
) -> Spot | None:
    """The best place for a whole gang, or for so many of its replicas, or None if there is no room within one domain of
    the pool and its topology. `free` is what it may use."""
    wanted = ask.replicas if replicas is None else replicas
    if ask.topology is not None:
        return _spot_by_topology(table, free, ask, gpu_type, allowed, wanted)
    best: tuple[int, int, int] | None = None
    spot = None
    for number, domain in enumerate(table.domains(gpu_type)):
        columns = domain.columns.start + np.flatnonzero(allowed[domain.columns])
        here = free[:, columns]
        counts = room(here, ask.shape, wanted)
        if int(counts.sum()) < wanted:
            continue
        tightness = _tightness(here, table.total[:, columns], ask.shape.is_cpu_only)
        nodes, on_each = choose_nodes(counts, tightness, wanted)
        rank = (len(nodes), int(tightness[nodes].max()), number)
        if best is None or rank < best:
            best, spot = rank, Spot(gpu_type, columns[nodes].tolist(), on_each)
    return spot


def _spot_by_topology(
    table: NodeTable, free: Amounts, ask: Ask, gpu_type: str | None, allowed: Mask, wanted: int
) -> Spot | None:
    """The place with the fewest domains at each level, then with the best fit, then the first."""
    if wanted % ask.step:
        return None
    rule = rule_of(ask.topology, table.levels)
    best: Choice | None = None
    spot = None
    resource = CPUS if ask.shape.is_cpu_only else GPUS
    for domain, tree in zip(table.domains(gpu_type), table.trees(gpu_type), strict=True):
        columns, order = domain.columns, tree.columns - domain.columns.start
        counts = room_where(free[:, columns], ask.shape, max(wanted, MOST), allowed[columns])
        if int(counts.sum()) < wanted:
            continue
        amounts = np.maximum(free[resource, columns], 0) * allowed[columns]
        spared = (counts * (table.total[GPUS, columns] > 0))[order] if ask.shape.is_cpu_only else None
        choice = choose(Rooms(tree, rule, counts[order], amounts[order], spared), wanted)
        if choice is not None and (best is None or choice.rank < best.rank):
            best = choice
            spot = Spot(gpu_type, tree.columns[choice.nodes].tolist(), choice.replicas.tolist())
    return spot


def choose_nodes(counts: Amounts, tightness: Amounts, replicas: int) -> tuple[list[int], list[int]]:
    """(nodes, replicas on each) for so many replicas, of which `counts` (at least as many in sum) have room. The least
    tightness wins; then the first."""
    roomy_first = np.lexsort((tightness, -counts)) if counts.max() < replicas else np.zeros(0, dtype=np.int64)
    filled = counts[roomy_first]
    rest = replicas - (np.cumsum(filled) - filled)
    whole = int(np.argmax(filled >= rest)) if len(filled) else 0  # so many nodes are filled before the last one
    last_replicas = int(rest[whole]) if len(rest) else replicas
    nodes = roomy_first[:whole]
    candidates = counts >= last_replicas
    candidates[nodes] = False
    last = int(np.argmin(np.where(candidates, tightness, np.iinfo(np.int64).max)))
    return [*map(int, nodes), last], [*map(int, counts[nodes]), last_replicas]


def _tightness(free: Amounts, total: Amounts, is_cpu_only: bool) -> Amounts:
    """Smaller = less would be left. One number per node, so that nodes compare by one resource after the other."""
    gpus, cpus, memory = (np.minimum(free[r], _MOST) for r in (GPUS, CPUS, MEMORY))
    if is_cpu_only:
        first, second, third = (total[GPUS] > 0).astype(np.int64), cpus, memory
    else:
        first, second, third = gpus, cpus, memory
    return (first << 2 * _BITS) | (np.maximum(second, 0) << _BITS) | np.maximum(third, 0)
