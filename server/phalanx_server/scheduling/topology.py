"""Owns topology: the tree of domains in a pool of nodes, and which of them a gang takes.

Refuses to know what nodes are called, what they have and who asks: for how many replicas each node has room goes in,
how many each gets comes out. Nodes are counted in the order of the tree, in which every domain is one run of them.
Depth 0 is the pool, the last depth the node, and between them are the levels of the policy, outermost first. A node
without a label of some level is a domain of its own there: in one rack with itself, and with no other.

The choice: the fewest domains at each depth, outermost first, and the best fit among equals. That is the rule of
Kueue's topology-aware scheduling (KEP 2724, BestFit): if one domain holds all, the smallest that does; else the
roomiest first, and for the rest the smallest that holds it. Two things are added: a gang that a single domain further
in holds goes there, whatever is the best fit further out; and of several domains that hold it those come first in which
it takes the fewest further in.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from phalanx_server.scheduling.snapshot import Topology

Ints = NDArray[np.int64]

_BITS = 20
MOST = (1 << _BITS) - 1
"""Room beyond this is all the same to the best fit."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a gang asks of the tree, in depths. It stays in one domain at `bound` (0: in the pool); the best fit begins
    at `named`; of each `slice_replicas` all are in one domain at `slice_depth`."""

    bound: int
    named: int
    slice_depth: int
    slice_replicas: int


@lru_cache(maxsize=1024)
def rule_of(topology: Topology | None, levels: tuple[str, ...]) -> Rule:
    """The rule of a job's topology, for trees of these levels. On a level that the policy no longer has, no node has a
    label: there each is a domain of its own."""
    innermost = len(levels) + 1
    depth = defaultdict(lambda: innermost, {level: i for i, level in enumerate(levels, start=1)})
    if topology is None:
        return Rule(0, 0, innermost, 1)
    bound = 0 if topology.required is None else depth[topology.required]
    named = depth[topology.required or topology.preferred or "node"]
    if topology.slice is None or depth[topology.slice.level] <= bound:
        return Rule(bound, named, innermost, 1)
    return Rule(bound, named, depth[topology.slice.level], topology.slice.replicas)


class Tree:
    """The domains of one pool. `columns` are those of its nodes in the node table, in the order of the tree."""

    def __init__(self, columns: Sequence[int], paths: Sequence[Sequence[str | None]], levels: int) -> None:
        """`paths`: the labels of each column, outermost first. Domains are ordered by label, nodes as they come."""
        order = sorted(range(len(columns)), key=lambda i: [(label is None, label or "") for label in paths[i]])
        self.columns: Ints = np.array([columns[i] for i in order], dtype=np.int64)
        self.starts: list[Ints] = _starts([paths[i] for i in order], levels)
        pairs = list(zip(self.starts, self.starts[1:], strict=False))
        self.parents: list[Ints] = [np.zeros(1, dtype=np.int64)]
        self.parents += [np.searchsorted(above, below, side="right") - 1 for above, below in pairs]
        self._firsts: list[Ints] = [np.searchsorted(below, above) for above, below in pairs]

    @property
    def innermost(self) -> int:
        """The depth of nodes."""
        return len(self.starts) - 1

    def of_nodes(self, values: Ints, depth: int) -> Ints:
        """The sum of a value over the nodes of each domain at a depth."""
        return values if depth == self.innermost else np.add.reduceat(values, self.starts[depth])

    def outwards(self, values: Ints, depth: int) -> Ints:
        """The sum, for each domain at a depth, of a value of the domains one further in."""
        return np.add.reduceat(values, self._firsts[depth])

    def above(self, domains: Ints, *, depth: int, at: int) -> Ints:
        """The domains at `at` in which domains at `depth` lie."""
        for d in range(depth, at, -1):
            domains = self.parents[d][domains]
        return domains


def _starts(paths: Sequence[Sequence[str | None]], levels: int) -> list[Ints]:
    """At each depth, where each domain's nodes begin."""
    starts: list[list[int]] = [[] for _ in range(levels + 2)]
    before: Sequence[str | None] | None = None
    for i, path in enumerate(paths):
        shared = -1 if before is None else _shared(before, path)
        for depth in range(shared + 1, levels + 2):
            starts[depth].append(i)
        before = path
    return [np.array(s, dtype=np.int64) for s in starts]


def _shared(a: Sequence[str | None], b: Sequence[str | None]) -> int:
    """The innermost depth at which two nodes are in the same domain."""
    for depth, (one, other) in enumerate(zip(a, b, strict=True)):
        if one is None or one != other:
            return depth
    return len(a)


def rooms_by_depth(tree: Tree, rule: Rule, counts: Ints) -> list[Ints]:
    """For how many replicas each domain has room, by depth; in whole slices at their depth and further out. `counts` is
    the room on each node."""
    out = [tree.of_nodes(counts, d) for d in range(rule.slice_depth, tree.innermost + 1)]
    if rule.slice_replicas > 1:
        out[0] = out[0] // rule.slice_replicas * rule.slice_replicas
    for depth in range(rule.slice_depth - 1, -1, -1):
        out.insert(0, tree.outwards(out[0], depth))
    return out


class Rooms:
    """For how many replicas there is room in the domains of a tree, and how tight they are.

    `counts` is the room on each node. `amounts` is what is free there of the resource by which domains compare when
    their room is the same; nodes that are `spared` come last of all.
    """

    def __init__(self, tree: Tree, rule: Rule, counts: Ints, amounts: Ints, spared: Ints | None = None) -> None:
        self.tree, self.rule = tree, rule
        self.by_depth = rooms_by_depth(tree, rule, counts)
        self._counts, self._amounts, self._spared = counts, amounts, spared
        self._tightness: dict[int, Ints] = {}

    def tightness(self, depth: int) -> Ints:
        """Smaller = less would be left: by room in whole slices, then by room in parts of a slice, then by amount."""
        if depth not in self._tightness:
            parts = self.tree.of_nodes(self._counts, depth)
            amounts = self.tree.of_nodes(self._amounts, depth)
            key = np.minimum(self.by_depth[depth], MOST) << 2 * _BITS
            key |= (np.minimum(parts, MOST) << _BITS) | np.minimum(amounts, MOST)
            if self._spared is not None:
                key |= (self.tree.of_nodes(self._spared, depth) > 0).astype(np.int64) << 3 * _BITS
            self._tightness[depth] = key
        return self._tightness[depth]


@dataclass(frozen=True, slots=True)
class Choice:
    """Nodes for a gang, in the order of the tree, and the replicas on each. Of two choices the one of lesser `rank` is
    better: the number of domains at each depth, then how much room there is in those that hold all."""

    nodes: Ints
    replicas: Ints
    rank: tuple[tuple[int, ...], tuple[int, ...]]


def choose(rooms: Rooms, replicas: int) -> Choice | None:
    """Where so many replicas, a multiple of the slice, go; None if no domain at the rule's bound holds them."""
    depth = _innermost_that_holds(rooms, replicas)
    if depth is None:
        return None
    holders = np.flatnonzero(rooms.by_depth[depth] >= replicas)
    taken = _Taken(holders, np.full(len(holders), replicas), np.arange(len(holders)))
    fewest = [1] * depth
    units, needs = taken.holders, taken.replicas  # within a unit replicas may be anywhere: a holder, or a slice domain
    for d in range(depth + 1, rooms.tree.innermost + 1):
        rows, units_of_rows, holders_of_rows = _children(rooms, d, taken, units)
        given = share_out(needs, units_of_rows, rooms.by_depth[d][rows], rooms.tightness(d)[rows])
        some = given > 0
        taken, units = _Taken(rows[some], given[some], holders_of_rows[some]), units_of_rows[some]
        numbers = np.bincount(taken.holders, minlength=len(holders))
        fewest.append(int(numbers[numbers > 0].min()))
        best = numbers[taken.holders] == fewest[-1]
        taken, units = taken.where(best), units[best]
        if d == rooms.rule.slice_depth:
            units, needs = np.arange(len(taken.domains)), taken.replicas
    holder, tightness = _best_fit(rooms, holders, np.unique(taken.holders), depth)
    taken = taken.where(taken.holders == holder)
    return Choice(taken.domains, taken.replicas, (tuple(fewest), tightness))


@dataclass(frozen=True, slots=True)
class _Taken:
    """Domains at some depth, the replicas in each, and which of the domains that hold all each is in."""

    domains: Ints
    replicas: Ints
    holders: Ints

    def where(self, mask: NDArray[np.bool_]) -> "_Taken":
        return _Taken(self.domains[mask], self.replicas[mask], self.holders[mask])


def _innermost_that_holds(rooms: Rooms, replicas: int) -> int | None:
    for depth in range(rooms.tree.innermost, rooms.rule.bound - 1, -1):
        if rooms.by_depth[depth].max() >= replicas:
            return depth
    return None


def _children(rooms: Rooms, depth: int, taken: _Taken, units: Ints) -> tuple[Ints, Ints, Ints]:
    """The domains with room at a depth within those taken one further out, with the unit and the holder of each."""
    parents = rooms.tree.parents[depth]
    place = np.full(len(rooms.tree.starts[depth - 1]), -1, dtype=np.int64)
    place[taken.domains] = np.arange(len(taken.domains))
    rows = np.flatnonzero((place[parents] >= 0) & (rooms.by_depth[depth] > 0))
    parent = place[parents[rows]]
    return rows, units[parent], taken.holders[parent]


def _best_fit(rooms: Rooms, holders: Ints, among: Ints, depth: int) -> tuple[int, tuple[int, ...]]:
    """The tightest of some holders, from the named level inwards, and how tight it is; then the first."""
    tightness: list[int] = []
    for d in range(min(rooms.rule.named, depth), depth + 1):
        keys = rooms.tightness(d)[rooms.tree.above(holders[among], depth=depth, at=d)]
        tightness.append(int(keys.min()))
        among = among[keys == tightness[-1]]
    return int(among[0]), tuple(tightness)


def share_out(needs: Ints, units: Ints, rooms: Ints, tightness: Ints) -> Ints:
    """How many replicas each row gets, so that each unit that has rows gets what it needs in as few rows as possible.

    `needs` is by unit, the others by row; the rooms of a unit's rows add up to its need at least. The roomiest rows are
    filled first, the tightest of equals; the rest goes to the tightest row that holds it; then to the first.
    """
    order = np.lexsort((tightness, -rooms, units))
    unit, room = units[order], rooms[order]
    before = np.cumsum(room) - room
    begins = np.flatnonzero(np.diff(unit, prepend=-1))
    before -= np.repeat(before[begins], np.diff(begins, append=len(unit)))
    rest = needs[unit] - before
    filled, ends = (rest > 0) & (room < rest), (rest > 0) & (room >= rest)
    given = np.zeros(len(rooms), dtype=np.int64)
    given[order[filled]] = room[filled]
    last = np.zeros(len(needs), dtype=np.int64)
    last[unit[ends]] = rest[ends]
    hold = np.flatnonzero((given == 0) & (rooms >= last[units]))
    hold = hold[np.lexsort((tightness[hold], units[hold]))]
    first = hold[np.diff(units[hold], prepend=-1) != 0]
    given[first] = last[units[first]]
    return given
