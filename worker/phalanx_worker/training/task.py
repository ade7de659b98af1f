"""What a recipe says of its model, so that layouts can be applied to it from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel.style import ParallelStyle


@dataclass(frozen=True)
class Task:
    """A model to train, in parts that a layout can take up.

    `stage(index, count)` builds that part of the model out of `count` (the whole for 0 of 1), with parameter names as
    in the whole model; it is called under `torch.device("meta")`. `start(name, whole, generator)` fills one whole
    parameter with its first values. `blocks` are the units that are sharded and recomputed one by one, and
    `tensor_plan` how a stage is cut over tensor-parallel ranks (None: not at all). `inputs_and_targets` takes a batch
    apart; `loss(output, targets)` is their mean, an fp32 scalar.
    """

    stage: Callable[[int, int], nn.Module]
    start: Callable[[str, Tensor, torch.Generator], None]
    inputs_and_targets: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    blocks: Callable[[nn.Module], list[nn.Module]]
    tensor_plan: Callable[[nn.Module], dict[str, ParallelStyle]] | None = None
