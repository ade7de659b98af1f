"""Compares what has to be equal: the parameters of data-parallel replicas, by checksum.

Owns the checksum and the search for the rank that is wrong. A flipped bit in one replica's parameter stays there, as
all replicas take the same updates (silent data corruption: Dixit et al. 2021, arXiv:2102.11245). Shards and stages
compare with their own copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phalanx_worker.training.health.rules import farthest_out, odd_ones

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Difference:
    """Replicas that differ: `ranks` in the world; `decided`: they are the ones to blame, else only suspects. `where`
    names the first tensor that differs."""

    ranks: tuple[int, ...]
    decided: bool
    where: str

    def sentence(self, step: int) -> str:
        names = " and ".join(str(rank) for rank in self.ranks)
        if not self.decided:
            return f"the parameters of ranks {names} differ from each other after step {step}{self.where}; one is wrong"
        whose = f"rank {names}" if len(self.ranks) == 1 else f"ranks {names}"
        return f"the parameters of {whose} differ from the other replicas' after step {step}{self.where}"


def replicated(named: Named) -> Named:
    """Those of them that replicas have copies of; embedding tables are shared out over replicas instead."""
    return [(name, parameter) for name, parameter in named if not _is_shared_out(parameter)]


def _is_shared_out(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    axes = zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
    return any(axis == "replicas" and placement.is_shard() for axis, placement in axes)


@torch.no_grad()
def checksums(named: Named) -> Tensor:
    """The sum of the bit patterns of each parameter, int64 (parameters,), wrapping: any one flipped bit changes it."""
    sums = [_bits(_local(parameter)).sum(dtype=torch.int64) for _, parameter in named]
    return torch.stack(sums)


def compare(named: Named, replicas: dist.ProcessGroup | None) -> Difference | None:
    """What differs among any replicas, the same on every rank of the world; every rank calls it after the same step.
    `replicas` hold the same parameters as this rank."""
    own = _compare(named, replicas) if replicas is not None else None
    found = torch.tensor(int(own is not None), device=_device(named))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if not found.item():
        return None
    everyones: list[Difference | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    differences = [difference for difference in everyones if difference is not None]
    return next((one for one in differences if one.decided), differences[0])


def _compare(named: Named, group: dist.ProcessGroup) -> Difference | None:
    sums = checksums(named)
    rows = _gathered(sums, group)
    if (rows == sums).all():
        return None
    odd = odd_ones([tuple(row) for row in rows.tolist()])
    assert odd is not None
    first = int((rows != rows[0]).any(dim=0).nonzero()[0])
    ranks = dist.get_process_group_ranks(group)
    where, culprit = _evidence(*named[first], ranks, group)
    if not odd.decided and culprit is not None:
        return Difference((culprit,), True, where)
    return Difference(tuple(ranks[i] for i in odd.members), odd.decided, where)


@torch.no_grad()
def _evidence(name: str, parameter: nn.Parameter, ranks: list[int], group: dist.ProcessGroup) -> tuple[str, int | None]:
    """What the replicas hold where they differ first, in words; and the rank whose value is out of all proportion to
    the rest of the tensor."""
    copies = _gathered(_local(parameter).contiguous().flatten(), group)
    bits = _bits(copies)
    differing = (bits != bits[0]).any(dim=0)
    place = int(differing.nonzero()[0])
    values = [float(copy[place]) for copy in copies]
    rest = copies[0][~differing].float()
    usual = float(rest.abs().max()) if len(rest) else 0.0
    culprit = farthest_out(values, usual=usual)
    held = ", ".join(f"{value:.6g} on rank {rank}" for value, rank in zip(values, ranks, strict=True))
    return f" (first in {name}: {held})", None if culprit is None else ranks[culprit]


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(replicas, length) of a vector of each."""
    everyones = own.new_empty(group.size() * len(own))
    dist.all_gather_single(everyones, own, group=group)
    return everyones.view(group.size(), -1)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_BITS[values.element_size()])


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _device(named: Named) -> torch.device:
    return _local(named[0][1]).device
