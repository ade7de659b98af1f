"""Where this rank stands: its device, the gang's one DeviceMesh, and which part of each batch is its own.

Owns process groups. It knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]  (public, says its docstring)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pipeline", "replicas", "shard", "tensor")  # of the mesh, outermost first: tensor ranks are neighbours


@dataclass(frozen=True)
class World:
    """`mesh` has those of `AXES` that are larger than 1 (and `shard` wherever `fully_shard` is used); None on a single
    rank. `replicas` have the same parameters and sum their gradients: they are data × context. `context_group` are
    those of them that share each sequence."""

    device: torch.device
    parallel: Parallel  # with `data` filled in
    mesh: DeviceMesh | None
    context_group: dist.ProcessGroup | None = None

    def rank_in(self, axis: str) -> int:
        """This rank's place along an axis of the mesh; 0 where the axis has size 1."""
        return self.mesh.get_local_rank(axis) if self.mesh and axis in self._axes else 0

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along the axis (or `context`) alone; None where there are none."""
        if axis == "context":
            return self.context_group
        return self.mesh.get_group(axis) if self.mesh and axis in self._axes else None

    @property
    def batch_rank(self) -> int:
        """Which of the `parallel.batch_ways` parts of each global batch is this rank's."""
        return self.rank_in("replicas") // self.parallel.context * self.parallel.shard + self.rank_in("shard")

    @property
    def sharding_mesh(self) -> DeviceMesh | None:
        """The mesh for `fully_shard`: over `shard`, below replicas where those share each gradient. None where
        parameters are not sharded."""
        if self.mesh is None or "shard" not in self._axes:
            return None
        hybrid = "replicas" in self._axes and not self.parallel.local.every
        return self.mesh["replicas", "shard"] if hybrid else self.mesh["shard"]

    @property
    def _axes(self) -> tuple[str, ...]:
        return (self.mesh.mesh_dim_names or ()) if self.mesh else ()


def make_world(parallel: Parallel, device: torch.device) -> World:
    """The world of an initialised default process group. Raises RecipeError for what the device cannot do."""
    if parallel.compress == "bf16" and device.type == "cpu":
        raise RecipeError("parallel.compress", "= 'bf16' needs NCCL, which is for GPUs; use fp16 on the CPU")
    axes = zip(AXES, parallel.sizes, strict=True)
    sizes = {axis: size for axis, size in axes if size > 1 or (axis == "shard" and parallel.fully_sharded)}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None
    return World(device=device, parallel=parallel, mesh=mesh, context_group=_context_group(parallel, device))


def _context_group(parallel: Parallel, device: torch.device) -> dist.ProcessGroup | None:
    """Next to each other among the replicas."""
    if parallel.context == 1:
        return None
    stages, replicas, *rest = parallel.sizes
    shape = (stages * replicas // parallel.context, parallel.context, prod(rest))
    return init_device_mesh(device.type, shape, mesh_dim_names=("others", "context", "rest")).get_group("context")


def own_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The GPU of this rank where every rank of the node has one (or where it is wanted), else the CPU."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    enough = torch.cuda.device_count() >= local_ranks
    if wanted == "cuda" and not enough:
        text = f"= 'cuda', but {torch.cuda.device_count()} GPUs are visible to {local_ranks} ranks; use auto or cpu"
        raise RecipeError("device", text)
    if wanted == "cpu" or not enough:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, *, offload: bool = False) -> Iterator[int]:
    """The default process group of torchrun's environment (a gang of one without it) while inside; gives its size.
    `offload`: parameters and gradients lie in host memory (`parallel.offload`)."""
    alone = {} if "RANK" in os.environ else {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(_backends(device, offload=offload), device_id=_index(device), **alone)
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _backends(device: torch.device, *, offload: bool) -> str:
    """What exchanges tensors, of this group and of those the mesh makes from it. NCCL takes tensors on GPUs alone, and
    with `offload` the gradient's norm and the optimizer's sums are on the CPU, while parameters are gathered on GPUs.
    Both then wait 30 minutes, torch's default for anything but NCCL by itself (10)."""
    if device.type == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"


def _index(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None
