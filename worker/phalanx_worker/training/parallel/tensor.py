"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022,
arXiv:2205.05198): heads and inner widths are cut over ranks; between them, norms and the residual stream are cut along
the sequence."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from phalanx_worker.training.models.transformer import Transformer

SEQUENCE = Shard(1)


def cut(module: nn.Module, mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> None:
    """Cut the module's parameters over the one-dimensional mesh; they become DTensors."""
    parallelize_module(module, mesh, plan)


def transformer_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """How a transformer, or a stage of one, is cut. Between stages each rank passes its part of the sequence on."""
    assert isinstance(model, Transformer)
    plan: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE)
    for layer in model.blocks:
        plan |= {f"blocks.{layer}.{name}": style for name, style in _block_plan().items()}
    if model.head is not None:
        plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(input_layouts=SEQUENCE, output_layouts=Replicate())
    return plan


def _block_plan() -> dict[str, ParallelStyle]:
    whole = (Replicate(),)
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=whole),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=SEQUENCE),
        "feed_norm": SequenceParallel(),
        "feed": PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=whole),
        "feed.gate": ColwiseParallel(),
        "feed.up": ColwiseParallel(),
        "feed.down": RowwiseParallel(output_layouts=SEQUENCE),
    }
