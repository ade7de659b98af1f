"""Lays a task's model over the gang: the one place where every technique is applied, in order.

Owns the order of things and the forward and backward of one step. Each technique is a module beside this one; the model
knows none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from phalanx.recipes.parallel import LocalSteps, Parallel
from phalanx.recipes.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from phalanx_worker.training.mesh import World
from phalanx_worker.training.parallel import context, pipeline, recompute, replicas, sharding, tensor
from phalanx_worker.training.parallel.local import Outer
from phalanx_worker.training.precision import use_autocast, use_fp8
from phalanx_worker.training.task import Task


class Layout:
    """This rank's part of the model, ready to train: `modules` are its stages (one without interleaving), bare of what
    replicates them, so that names and state are those of the whole model."""

    def __init__(self, task: Task, world: World, modules: Mapping[int, nn.Module], *, accumulate: int) -> None:
        self.world = world
        self.modules = list(modules.values())
        self._task = task
        self._accumulate = accumulate
        self._loss_scale = 1.0
        self._part = _part_of_sequence(modules.values(), world.group("context"))
        self._runs = {index: _replicated(module, world) for index, module in modules.items()}
        self._schedule = self._make_schedule(world.parallel, world.group("pipeline"))
        self.outer = self._make_outer(world.parallel.local, world.group("replicas"))

    def run(self, batch: Mapping[str, Tensor], *, loss_scale: float = 1.0) -> Tensor | None:
        """Forward and backward of this rank's part of a global batch: leaves in `grad` the gradient of `loss_scale` ×
        the global batch's mean loss. Gives the mean loss of the part, an fp32 scalar; None on the ranks of a pipeline
        that do not hold its end."""
        self._loss_scale = loss_scale
        inputs, targets = self.take(batch)
        return self._run_whole(inputs, targets) if self._schedule is None else self._run_pieces(inputs, targets)

    def take(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets, on its device: of sequences that are shared out, its part of each."""
        inputs, targets = (part.to(self.world.device) for part in self._task.inputs_and_targets(batch))
        return (inputs, targets) if self._part is None else (self._part.take(inputs), self._part.take(targets))

    def forget_left_out(self) -> None:
        """Drop what compression left out of the gradients so far; on all ranks between the same steps."""
        for model in self._runs.values():
            if isinstance(model, replicas.Replica):
                model.forget_left_out()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's, of all its stages."""
        return (parameter for module in self.modules for parameter in module.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same, by their names in the whole model."""
        return (named for module in self.modules for named in module.named_parameters())

    def _run_whole(self, inputs: Tensor, targets: Tensor) -> Tensor:
        (model,) = self._runs.values()
        parts = list(zip(inputs.chunk(self._accumulate), targets.chunk(self._accumulate), strict=True))
        total = torch.zeros((), device=inputs.device)
        for number, (some, their_targets) in enumerate(parts, 1):
            with _exchanging(model, number == len(parts)):
                loss = self._task.loss(model(some), their_targets) / len(parts)
                (loss * self._loss_scale).backward()
            total += loss.detach()
        return total

    def _run_pieces(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        assert self._schedule is not None
        losses: list[Tensor] = []
        first, last = 0 in self._runs, self.world.parallel.stages - 1 in self._runs
        ends = {"target": targets, "losses": losses} if last else {}
        self._schedule.step(*([inputs] if first else []), **ends, return_outputs=False)
        return torch.stack(losses).sum().detach() / self._loss_scale if last else None

    def _piece_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(output, targets) * (self._loss_scale / self.world.parallel.pieces)

    def _make_schedule(self, parallel: Parallel, group: dist.ProcessGroup | None):
        if group is None:
            return None
        return pipeline.make_schedule(self._runs, parallel, group, device=self.world.device, loss=self._piece_loss)

    def _make_outer(self, local: LocalSteps, group: dist.ProcessGroup | None) -> Outer | None:
        return Outer(self.named_parameters(), local, group) if local.every else None


def lay_out(task: Task, world: World, precision: Precision, *, seed: int, accumulate: int = 1) -> Layout:
    """Build the model and apply the layout. First values depend on `seed` and each parameter's name alone, not on the
    layout. Raises RecipeError where the device cannot compute in the format."""
    parallel, mesh = world.parallel, world.mesh
    with torch.device("meta"):
        stages = pipeline.own_stages(parallel, world.rank_in("pipeline"))
        modules = {index: task.stage(index, parallel.stages) for index in stages}
    for module in modules.values():
        blocks = task.blocks(module)
        use_fp8(blocks, precision, world.device)
        if parallel.tensor > 1:
            assert mesh is not None
            tensor.cut(module, mesh["tensor"], _plan(task, module))
        recompute.recompute_blocks(blocks, parallel.recompute)
        if parallel.fully_sharded:
            assert world.sharding_mesh is not None
            sharding.shard(module, blocks, world.sharding_mesh, parallel=parallel, precision=precision)
        else:
            use_autocast(module, precision, world.device)
        _materialize(module, task, device=torch.device("cpu") if parallel.offload else world.device, seed=seed)
    return Layout(task, world, modules, accumulate=accumulate)


def _plan(task: Task, module: nn.Module):
    if task.tensor_plan is None:
        raise ValueError("this model has no plan for tensor parallelism: use parallel.tensor = 1")
    return task.tensor_plan(module)


@torch.no_grad()
def _materialize(module: nn.Module, task: Task, *, device: torch.device, seed: int) -> None:
    """Give the parameters memory and their first values: one whole parameter at a time, of which each rank keeps its
    part."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        task.start(name, whole, torch.Generator(device).manual_seed(_seed_of(seed, name)))
        if isinstance(parameter, DTensor):
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest())


def _part_of_sequence(modules: Iterable[nn.Module], group: dist.ProcessGroup | None) -> context.PartOfSequence | None:
    if group is None:
        return None
    part = context.PartOfSequence(group)
    context.use_parts(modules, part)
    return part


def _replicated(module: nn.Module, world: World) -> nn.Module:
    group = world.group("replicas")
    if group is None or world.parallel.fully_sharded or world.parallel.local.every:
        return module
    return replicas.Replica(module, group, world.parallel)


def _exchanging(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """While inside, backward reduces gradients over ranks, or (not `now`) adds them up on each rank alone."""
    if isinstance(model, sharding.FSDPModule):
        sharding.exchange_gradients(model, now)
    elif isinstance(model, replicas.Replica) and not now:
        return model.no_sync()
    return nullcontext()
