"""Embedding tables shared out row by row over all ranks, beside replicated layers: each rank asks the others for the
rows that its samples need, and sends the gradients of these rows back (as in Mudigere et al. 2022, arXiv:2104.05158).

Owns the exchange and the forward and backward of one step. The tables are one DTensor, so that checkpoints, clipping
and optimizers take them as they take any sharded parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from phalanx_worker.training.mesh import World
from phalanx_worker.training.models.dlrm import Tables, start_rows
from phalanx_worker.training.parallel import replicas
from phalanx_worker.training.parallel.layout import Layout

Loss = Callable[[Tensor, Tensor], Tensor]


class TablesLayout(Layout):
    """This rank's share of the tables and its replica of the layers, ready to train. `loss(logits, labels)` is their
    mean, an fp32 scalar."""

    def __init__(self, tables: Tables, dense: nn.Module, world: World, *, loss: Loss, accumulate: int) -> None:
        self.world = world
        self.modules = [dense, tables]
        self.outer = None
        self.tables = tables
        self._mean_loss, self._parts = loss, accumulate
        group = world.group("replicas")
        self._dense = dense if group is None else replicas.Replica(dense, group, world.parallel)

    def run(self, batch: Mapping[str, Tensor], *, loss_scale: float = 1.0) -> Tensor:
        """Forward and backward of this rank's part of a global batch: `dense` (batch, counts), `categories` (batch,
        tables) and `label` (batch,). Leaves in `grad` the gradient of `loss_scale` × the global batch's mean loss;
        gives the mean loss of the part."""
        names = ("dense", "categories", "label")
        parts = list(zip(*(batch[name].to(self.world.device).chunk(self._parts) for name in names), strict=True))
        total = torch.zeros((), device=self.world.device)
        for number, (counts, words, labels) in enumerate(parts, 1):
            with self._exchanging(number == len(parts)):
                loss = self._mean_loss(self._dense(counts, self.tables(words)), labels) / len(parts)
                (loss * loss_scale).backward()
            total += loss.detach()
        return total

    def forget_left_out(self) -> None:
        if isinstance(self._dense, replicas.Replica):
            self._dense.forget_left_out()

    def _exchanging(self, now: bool):
        """While inside, backward reduces the layers' gradients over ranks, or (not `now`) adds them up on each alone;
        gradients of rows go to their owner every time."""
        return self._dense.no_sync() if isinstance(self._dense, replicas.Replica) and not now else nullcontext()


def share_out(tables: Tables, world: World, *, seed: int) -> None:
    """Give the tables (on the meta device) memory and first values: all rows, or this rank's among the replicas."""
    rows, dim = tables.tables.shape
    mesh = None if world.mesh is None else world.mesh["replicas"]
    each = -(-rows // (1 if mesh is None else mesh.size()))
    first = min(rows, each * world.rank_in("replicas"))
    own = torch.empty(min(each, rows - first), dim, device=world.device)
    start_rows(own, first=first, seed=seed)
    if mesh is None:
        tables.tables = nn.Parameter(own)
        return
    tables.tables = nn.Parameter(
        DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, dim)), stride=(dim, 1))
    )
    tables.lookup = SharedRows(mesh, each=each)


class SharedRows:
    """Looks rows up wherever they are: rank r of the mesh has those from r · `each` on. Every row that a rank needs
    travels once, however many of its samples need it."""

    def __init__(self, mesh: DeviceMesh, *, each: int) -> None:
        self._group, self._each = mesh.get_group(), each

    def __call__(self, tables: Tensor, rows: Tensor) -> Tensor:
        """(…,) rows -> (…, dim). The gradient is that of the mean of all ranks' losses."""
        assert isinstance(tables, DTensor)
        ranks = self._group.size()
        wanted, places = rows.unique(return_inverse=True)  # sorted, so those of one owner stand together
        from_each = (wanted // self._each).bincount(minlength=ranks)
        to_each = torch.empty_like(from_each)
        dist.all_to_all_single(to_each, from_each, group=self._group)
        receive, send = from_each.tolist(), to_each.tolist()
        asked = wanted.new_empty(sum(send))
        dist.all_to_all_single(asked, wanted, send, receive, group=self._group)

        vectors = tables.to_local()[asked - self._each * self._group.rank()]
        vectors = all_to_all_single_autograd(vectors, receive, send, self._group)
        if vectors.requires_grad:
            vectors.register_hook(lambda gradient: gradient / ranks)
        return vectors[places]
