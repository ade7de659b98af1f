"""Which number formats a recipe computes in. Standard library only; what a device can do is checked where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.recipes.parse import demand, demand_sizes

Compute = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True)
class Precision:
    """`compute` is the format of matrix products (autocast, or FSDP's mixed precision); parameters and optimizer state
    stay in fp32. `reduce` is the format in which sharded gradients are summed. The `loss_scale`s are fp16's."""

    compute: Compute = "fp32"
    reduce: Literal["fp32", "bf16"] = "fp32"
    loss_scale: float = 65536.0  # the first; halved at an overflow
    loss_scale_interval: int = 2000  # steps without overflow until it is doubled

    def __post_init__(self) -> None:
        demand(self.compute != "fp8", "compute", self.compute, "is not built yet; use bf16")
        demand(self.loss_scale > 0, "loss_scale", self.loss_scale, "is not positive; use 65536")
        demand_sizes(self, least=1, loss_scale_interval=1 << 40)
