"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer state are split over ranks, gathered
block by block (Zhao et al. 2023, arXiv:2304.11277); over a two-dimensional mesh, groups of shards are replicated
(hybrid sharding)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from phalanx.recipes.parallel import Parallel
from phalanx.recipes.precision import Precision
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from phalanx_worker.training.precision import sharded_policy


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, parallel: Parallel, precision: Precision
) -> None:
    """Shard the module over the mesh, each block as a unit of its own. A pipeline keeps what it gathered until the last
    of its microbatches: it would gather once for each otherwise."""
    options = {
        "mesh": mesh,
        "mp_policy": sharded_policy(precision),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        if parallel.offload
        else OffloadPolicy(),
        "reshard_after_forward": parallel.reshard and parallel.pipeline == 1,
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(module, **options)


def exchange_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over ranks, or only adds to what each has."""
    sharded = cast(FSDPModule, module)
    sharded.set_requires_gradient_sync(now)
    sharded.set_is_last_backward(now)
