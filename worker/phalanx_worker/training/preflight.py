"""Before a gang trains: how fast its nodes calculate, move memory and reach each other, and which does worse.

Owns the measuring and the rule. Runs in a child of each rank, in a process group of its own on the gang's store, so the
program that comes after finds everything as if this had never been. Some seconds at most; half a second on CPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
_SENT_BYTES, _SENT_BYTES_GPU = 4 << 20, 256 << 20
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Figures:
    """Of one rank. `link_bytes_s`: the best of its node's links to others, on local rank 0; 0 where not measured."""

    rank: int
    node: int
    flops: float
    memory_bytes_s: float
    link_bytes_s: float = 0.0


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


MEASURES: dict[str, Callable[[Figures], float]] = {
    "speed in matrix products": lambda figures: figures.flops,
    "memory bandwidth": lambda figures: figures.memory_bytes_s,
    "network bandwidth": lambda figures: figures.link_bytes_s,
}


def judge(gathered: Sequence[Figures], factor: float) -> list[Unfit]:
    """The nodes that do more than `factor` times worse than the median of the others in some measure. A node is as good
    as the worst of its ranks; with one node alone there is nothing to compare."""
    nodes = sorted({figures.node for figures in gathered})
    found: dict[int, Unfit] = {}
    for what, of in MEASURES.items():
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
        dist.all_gather_object(gathered, _measure(rank, device))
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


def _measure(rank: int, device: torch.device) -> Figures:
    dist.barrier()
    flops = _flops(device)
    dist.barrier()
    memory = _memory_bytes_s(device)
    dist.barrier()
    return Figures(rank, int(os.environ["GROUP_RANK"]), flops, memory, _link_bytes_s(device))


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


def _link_bytes_s(device: torch.device) -> float:
    """The best bandwidth of this node to some others, one pair of first ranks after the other; 0 on other ranks."""
    leaders = _leaders()
    if len(leaders) < 2:
        return 0.0
    rank, best = dist.get_rank(), 0.0
    data = torch.zeros(_SENT_BYTES_GPU if device.type == "cuda" else _SENT_BYTES, device=device, dtype=torch.uint8)
    into = torch.empty_like(data)
    for shift in range(1, min(_NEIGHBOURS, len(leaders) - 1) + 1):
        if rank in leaders:
            me = leaders.index(rank)
            to, of = leaders[(me + shift) % len(leaders)], leaders[me - shift]
            best = max(best, data.numel() / _best_s(lambda to=to, of=of: _swap(data, into, to, of), device))
        dist.barrier()
    return best


def _swap(data: torch.Tensor, into: torch.Tensor, to: int, of: int) -> None:
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, data, to), dist.P2POp(dist.irecv, into, of)])
    for work in works:
        work.wait()


def _leaders() -> list[int]:
    """The first rank of each node."""
    mine = dist.get_rank() if os.environ["LOCAL_RANK"] == "0" else None
    gathered: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [rank for rank in gathered if rank is not None]


def _summary(gathered: Sequence[Figures]) -> str:
    low = {name: min(values) for name in ("flops", "memory_bytes_s") if (values := [asdict(f)[name] for f in gathered])}
    nodes = len({figures.node for figures in gathered})
    return (
        f"preflight: {len(gathered)} ranks on {nodes} nodes are fit, the slowest with "
        f"{low['flops'] / 1e9:.0f} GFLOP/s and {low['memory_bytes_s'] / 1e9:.1f} GB/s of memory"
    )
