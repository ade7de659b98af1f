"""Owns the nodes as NumPy arrays: what each has, which take new work, who shares them, when they are in maintenance.

Refuses to know the queue and quotas. Arrays of amounts have one row per resource (GPUs, CPUs, GiB of memory) and one
column per node; columns are sorted by cluster, GPU type and name, so that the nodes of one pool are one slice.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from phalanx_server.domain.resources import Shape
from phalanx_server.scheduling.snapshot import Maintenance, Node
from phalanx_server.scheduling.topology import Tree

Amounts = NDArray[np.int64]
Mask = NDArray[np.bool_]

GPUS, CPUS, MEMORY = range(3)
LIMITLESS = 1 << 40
"""What a node that names no number of CPUs or GiB has of them."""


@dataclass(frozen=True, slots=True)
class Domain:
    """Nodes that may hold one gang together: of one cluster and, for GPU jobs, of one GPU type."""

    cluster: str | None
    columns: slice


class NodeTable:
    """What the nodes have, whatever runs on them. `levels` are the node labels that make topology domains, outermost
    first."""

    def __init__(self, nodes: Iterable[Node], levels: Sequence[str] = ()) -> None:
        rows = sorted(nodes, key=_pool_and_name)
        self.levels = tuple(levels)
        self.names = [n.name for n in rows]
        self.column = {name: i for i, name in enumerate(self.names)}
        self.total: Amounts = np.array([_amounts(n) for n in rows], dtype=np.int64).reshape(-1, 3).T.copy()
        self.ready: Mask = np.array([n.state == "ready" for n in rows], dtype=np.bool_)
        self.states: NDArray[np.str_] = np.array([n.state for n in rows], dtype="U8")
        self.types = [n.gpu_type for n in rows]
        self._paths = [tuple(n.labels.get(level) for level in self.levels) for n in rows]
        self._trees: dict[str | None, list[Tree]] = {}
        self._of_cluster = _runs([_cluster_key(n) for n in rows])
        self._of_pool = _runs([(_cluster_key(n), n.gpu_type) for n in rows])
        self.gpu_types = self._types_with_gpus()

    def replace(self, node: Node) -> Amounts:
        """Take over a node whose pool is the same; returns by how much each of its amounts grew."""
        i = self.column[node.name]
        grown = np.array(_amounts(node), dtype=np.int64) - self.total[:, i]
        self.total[:, i] += grown
        self.ready[i] = node.state == "ready"
        self.states[i] = node.state
        if grown[GPUS]:
            self.gpu_types = self._types_with_gpus()
        return grown

    def _types_with_gpus(self) -> list[str]:
        return sorted({t for t, gpus in zip(self.types, self.total[GPUS], strict=True) if gpus})

    def domains(self, gpu_type: str | None) -> list[Domain]:
        """Where a gang may lie: the pools of a GPU type, one per cluster; without a type, the clusters."""
        if gpu_type is None:
            return [Domain(cluster, columns) for (_, cluster), columns in self._of_cluster]
        return [Domain(cluster, columns) for ((_, cluster), of), columns in self._of_pool if of == gpu_type]

    def of_type(self, gpu_type: str | None) -> Mask:
        """The nodes where a job of this GPU type, or a CPU job, may lie."""
        mask = np.zeros(len(self.names), dtype=np.bool_)
        for domain in self.domains(gpu_type):
            mask[domain.columns] = True
        return mask

    def in_cluster_of(self, columns: Sequence[int]) -> Mask:
        """All nodes of the cluster that these nodes are of."""
        mask = np.zeros(len(self.names), dtype=np.bool_)
        for _, of in self._of_cluster:
            if columns and of.start <= columns[0] < of.stop:
                mask[of] = True
        return mask

    def trees(self, gpu_type: str | None) -> list[Tree]:
        """The topology of each of `domains`."""
        if gpu_type not in self._trees:
            spans = [range(d.columns.start, d.columns.stop) for d in self.domains(gpu_type)]
            self._trees[gpu_type] = [Tree(s, self._paths[s.start : s.stop], len(self.levels)) for s in spans]
        return self._trees[gpu_type]

    def of_types(self, gpu_types: Iterable[str]) -> Mask:
        """Which nodes are of one of these types; of any, if none is named."""
        wanted = set(gpu_types)
        return np.array([not wanted or t in wanted for t in self.types], dtype=np.bool_)

    def columns_of(self, replicas: Mapping[str, int]) -> tuple[list[int], list[int]]:
        """(columns, replicas) of a gang spread over nodes, without nodes that do not exist."""
        known = [(self.column[n], r) for n, r in replicas.items() if n in self.column]
        return [i for i, _ in known], [r for _, r in known]

    def mask_of(self, names: Iterable[str]) -> Mask:
        """The named nodes, of those that exist."""
        mask = np.zeros(len(self.names), dtype=np.bool_)
        mask[[self.column[n] for n in names if n in self.column]] = True
        return mask


def same_pool(a: Node, b: Node) -> bool:
    """Would the one stand where the other stands, in the sorted columns and in the topology?"""
    return (a.cluster, a.gpu_type, a.labels) == (b.cluster, b.gpu_type, b.labels)


def amounts_of(shape: Shape) -> Amounts:
    """One replica as a column."""
    return np.array([shape.gpus, shape.cpus, shape.memory_gib], dtype=np.int64)


def usable(free: Amounts, total: Amounts, *, by_cpu_jobs: bool) -> Amounts:
    """What of the free amounts a job may take: each free GPU keeps its node's `cpus/gpus` and `memory/gpus` share from
    CPU jobs."""
    if not by_cpu_jobs:
        return free
    out = free.copy()
    gpus = np.maximum(total[GPUS], 1)
    idle = np.maximum(free[GPUS], 0)
    for resource in (CPUS, MEMORY):
        limited = (total[GPUS] > 0) & (total[resource] < LIMITLESS)
        out[resource] -= np.where(limited, -(-idle * total[resource] // gpus), 0)
    return out


class Windows:
    """The maintenance windows that are not over."""

    def __init__(self, maintenance: Iterable[Maintenance], table: NodeTable, now: float) -> None:
        self._now = now
        self._width = len(table.names)
        self._windows = [(w.starts_at, w.ends_at, table.mask_of(w.nodes)) for w in maintenance if w.ends_at > now]

    def clear(self, run_limit_s: float | None, *, at: float | None = None) -> Mask:
        """The nodes on which a job that starts now, or `at` a later time, is sure to end before a window starts.
        Windows that end before it starts do not count."""
        starts = self._now if at is None else at
        run_ends_at = float("inf") if run_limit_s is None else starts + run_limit_s
        mask = np.ones(self._width, dtype=np.bool_)
        for starts_at, ends_at, nodes in self._windows:
            if starts_at < run_ends_at and ends_at > starts:
                mask &= ~nodes
        return mask

    def closed(self) -> Mask:
        """The nodes that are in a window now."""
        return ~self.clear(0.0, at=np.nextafter(self._now, np.inf))

    @property
    def ends(self) -> list[float]:
        """When windows end, earliest first."""
        return sorted({ends_at for _, ends_at, _ in self._windows})


class Occupants:
    """Who shares each node, as far as `policy.share_nodes` cares: branches of the tenant tree, or single jobs."""

    EMPTY, MIXED = 0, -1

    def __init__(self, width: int) -> None:
        self.sole: Amounts = np.zeros(width, dtype=np.int64)
        self._on: dict[int, Counter[int]] = {}
        self._numbers: dict[str, int] = {}

    def copy(self) -> "Occupants":
        """The same occupants, to be changed apart from these."""
        twin = Occupants(0)
        twin.sole, twin._numbers = self.sole.copy(), self._numbers
        twin._on = {i: Counter(owners) for i, owners in self._on.items()}
        return twin

    def enter(self, owner: str, columns: Iterable[int], replicas: Iterable[int], *, times: int = 1) -> None:
        """The owner has so many more replicas on these nodes; `times` -1: so many less."""
        mine = self._numbers.setdefault(owner, len(self._numbers) + 1)
        for i, count in zip(columns, replicas, strict=True):
            on = self._on.setdefault(i, Counter())
            on[mine] += times * count
            if not on[mine]:
                del on[mine]
            self.sole[i] = self.MIXED if len(on) > 1 else next(iter(on), self.EMPTY)

    def open_to(self, owner: str) -> Mask:
        """The nodes that are empty or its own alone."""
        return (self.sole == self.EMPTY) | (self.sole == self._numbers.get(owner, self.EMPTY))


def _amounts(node: Node) -> tuple[int, int, int]:
    cpus = LIMITLESS if node.cpus is None else node.cpus
    return node.gpus, cpus, LIMITLESS if node.memory_gib is None else node.memory_gib


_Key = TypeVar("_Key", bound=Hashable)


def _cluster_key(node: Node) -> tuple[bool, str | None]:
    return (node.cluster is not None, node.cluster)


def _pool_and_name(node: Node) -> tuple[bool, str, str, str]:
    return (node.cluster is not None, node.cluster or "", node.gpu_type, node.name)


def _runs(keys: Sequence[_Key]) -> list[tuple[_Key, slice]]:
    out: list[tuple[_Key, slice]] = []
    at = 0
    for key, members in groupby(keys):
        size = sum(1 for _ in members)
        out.append((key, slice(at, at + size)))
        at += size
    return out
