"""Before a gang trains: how fast its nodes calculate, move memory and all-reduce, within each and with others, and
which does worse.

Owns the measuring and the rule. Runs in a child of each rank, in a process group of its own on the gang's store, so the
program that comes after finds everything as if this had never been. Some seconds at most; half a second on CPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from phalanx import job

FIT, UNFIT = 0, 3
"""Exit codes of the child."""

distributed: Any = dist  # whose stores are not exported, as its documentation shows them

_TIMEOUT = timedelta(minutes=5)
_REPEATS = 3
_MATRIX, _MATRIX_GPU = 1024, 8192
_COPIED_BYTES, _COPIED_BYTES_GPU = 16 << 20, 2 << 30
_REDUCED_BYTES, _REDUCED_BYTES_GPU = 4 << 20, 64 << 20
_PARTNERS = 3  # of each node: one of them may be the bad one, so its best counts


@dataclass(frozen=True)
class Figures:
    """Of one rank. `intra_bytes_s` is its bandwidth in an all-reduce over the first so many ranks of its node, and
    `inter_bytes_s` in those with another node while the first so many ranks of each are in one: 0 where there was none.
    """

    rank: int
    node: int
    flops: float
    memory_bytes_s: float
    intra_bytes_s: Mapping[int, float] = field(default_factory=dict)
    inter_bytes_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfit:
    """A node that does worse than its peers in something. `rank` is its first."""

    node: int
    rank: int
    what: str
    times: float

    @property
    def message(self) -> str:
        return f"the node of rank {self.rank} has {1 / self.times:.0%} of the {self.what} of its peers"


def _measures(gathered: Sequence[Figures]) -> Iterator[tuple[str, Callable[[Figures], float]]]:
    yield "speed in matrix products", lambda figures: figures.flops
    yield "memory bandwidth", lambda figures: figures.memory_bytes_s
    for ranks in sorted({ranks for figures in gathered for ranks in figures.intra_bytes_s}):
        yield "intra-node all-reduce bandwidth", lambda figures, ranks=ranks: figures.intra_bytes_s.get(ranks, 0.0)
    for ranks in sorted({ranks for figures in gathered for ranks in figures.inter_bytes_s}):
        yield "inter-node all-reduce bandwidth", lambda figures, ranks=ranks: figures.inter_bytes_s.get(ranks, 0.0)


def judge(gathered: Sequence[Figures], factor: float) -> list[Unfit]:
    """The nodes that do more than `factor` times worse than the median of the others in some measure. A node is as good
    as the worst of its ranks; with one node alone there is nothing to compare."""
    nodes = sorted({figures.node for figures in gathered})
    found: dict[int, Unfit] = {}
    for what, of in _measures(gathered):
        known = [figures for figures in gathered if of(figures) > 0]
        by_node = {node: min(values) for node in nodes if (values := [of(f) for f in known if f.node == node])}
        for node, value in by_node.items():
            others = [theirs for other, theirs in by_node.items() if other != node]
            if others and median(others) > factor * value and node not in found:
                first_rank = min(figures.rank for figures in gathered if figures.node == node)
                found[node] = Unfit(node, first_rank, what, median(others) / value)
    return list(found.values())


def run(factor: float) -> int:
    """Measure this rank with all others, tell what was found, and answer FIT or UNFIT; in torchrun's environment."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(rank, world_size), rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        gathered: list[Figures | None] = [None] * world_size
        dist.all_gather_object(gathered, measure(device))
    finally:
        dist.destroy_process_group()
    unfit = judge([figures for figures in gathered if figures is not None], factor)
    for each in unfit if os.environ["LOCAL_RANK"] == "0" else ():
        job.mark("health", check="preflight", action="restart", message=each.message, blamed=each.rank)
    if rank == 0 and not unfit:
        job.mark("note", message=_summary([figures for figures in gathered if figures is not None]))
    return UNFIT if unfit else FIT


def _device() -> torch.device:
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _store(rank: int, world_size: int) -> Any:
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, world_size, is_master=hosts, timeout=_TIMEOUT)
    return distributed.PrefixStore("phalanx/preflight", store)


def measure(device: torch.device) -> Figures:
    """What this rank does, beside all others; in an initialised process group."""
    dist.barrier()
    flops = _flops(device)
    dist.barrier()
    memory = _memory_bytes_s(device)
    return Figures(dist.get_rank(), int(os.environ["GROUP_RANK"]), flops, memory, *all_reduces(device))


def _best_s(act: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, after one to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _flops(device: torch.device) -> float:
    """FLOP/s in a product of square matrices, bf16 on a GPU and fp32 on a CPU."""
    is_gpu = device.type == "cuda"
    size = _MATRIX_GPU if is_gpu else _MATRIX
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)
    return 2 * size**3 / _best_s(lambda: matrix @ matrix, device)


def _memory_bytes_s(device: torch.device) -> float:
    """Bytes read and written in a copy; on a GPU of as much memory as most have free."""
    size = _COPIED_BYTES_GPU if device.type == "cuda" else _COPIED_BYTES
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _best_s(lambda: target.copy_(source), device)


def all_reduces(device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """Bandwidth within nodes and between them, by the number of ranks that take part of each node. All of a node do; of
    larger nodes than others the first ranks once more, for ranks share out their node's links, and only as many compare
    with as many."""
    nodes = _nodes()
    intra, inter = {}, {}
    for ranks in sorted({len(node) for node in nodes}):
        alike = [node[:ranks] for node in nodes if len(node) >= ranks]
        intra[ranks] = _all_reduce_bytes_s(alike, device)
        inter[ranks] = max(_all_reduce_bytes_s(_across(alike, pairs), device) for pairs in meetings(len(alike)))
    return intra, inter


def _nodes() -> list[list[int]]:
    """The ranks of each node, by their local rank."""
    mine = (int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"]), dist.get_rank())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [[rank for of, _, rank in sorted(gathered) if of == node] for node in sorted({of for of, _, _ in gathered})]


def _across(nodes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]) -> list[Sequence[int]]:
    """The ranks with the same local rank on the two nodes of each pair."""
    return [ranks for one, other in pairs for ranks in zip(nodes[one], nodes[other], strict=True)]


def meetings(nodes: int) -> list[list[tuple[int, int]]]:
    """Which nodes work together, in rounds in each of which a node meets a new one, or none if their number is odd: a
    round-robin tournament by the circle method, cut short."""
    first, *circle = range(nodes + nodes % 2)
    rounds = []
    for turn in range(min(_PARTNERS, len(circle))):
        row = [first, *circle[turn:], *circle[:turn]]
        pairs = zip(row[: len(row) // 2], reversed(row), strict=False)
        rounds.append([pair for pair in pairs if max(pair) < nodes])
    return rounds


def _all_reduce_bytes_s(groups: Sequence[Sequence[int]], device: torch.device) -> float:
    """This rank's bus bandwidth (nccl-tests, PERFORMANCE.md) in an all-reduce of its group, while all groups, which are
    disjoint, are in theirs; 0 where it has no peer. Every rank makes a group, for the names that torch gives them count
    its others; it stays to the end, as gloo's have to."""
    own = next((list(ranks) for ranks in groups if dist.get_rank() in ranks), [dist.get_rank()])
    group = dist.new_group(own, timeout=_TIMEOUT, use_local_synchronization=True)
    size = _REDUCED_BYTES_GPU if device.type == "cuda" else _REDUCED_BYTES
    data = torch.zeros(size // 4, device=device)
    dist.all_reduce(data, group=group)  # connects: all begin together after it
    dist.barrier()
    took_s = _best_s(lambda: dist.all_reduce(data, group=group), device)
    dist.barrier()
    return 2 * (len(own) - 1) / len(own) * size / took_s


def _summary(gathered: Sequence[Figures]) -> str:
    flops = min(figures.flops for figures in gathered)
    memory = min(figures.memory_bytes_s for figures in gathered)
    reduced = [b for figures in gathered for by in (figures.intra_bytes_s, figures.inter_bytes_s) for b in by.values()]
    nodes = len({figures.node for figures in gathered})
    return (
        f"preflight: {len(gathered)} ranks on {nodes} nodes are fit, the slowest with {flops / 1e9:.0f} GFLOP/s, "
        f"{memory / 1e9:.1f} GB/s of memory and {min(filter(None, reduced), default=0.0) / 1e9:.1f} GB/s in all-reduces"
    )
