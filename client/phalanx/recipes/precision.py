"""Which number formats a recipe computes in, and what fp8 demands of a model and of GPU types. Standard library only;
what a device can do is checked again where it is (`phalanx_worker/training/precision.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from phalanx.recipes import devices
from phalanx.recipes.parse import RecipeError, demand, demand_sizes

Compute = Literal["fp32", "bf16", "fp16", "fp8"]

FP8_UNIT = 16  # of the sizes of matrices that GPUs multiply in fp8 (torch._scaled_mm)
OTHERWISE = "use bf16, or precision.emulate = true to try it, slowly"


@dataclass(frozen=True)
class Precision:
    """`compute` is the format of matrix products (autocast, or FSDP's mixed precision); parameters and optimizer state
    stay in fp32. fp8 is that of the linear layers within blocks alone (e4m3, of gradients e5m2, each tensor scaled to
    its largest value: Micikevicius et al. 2022, arXiv:2209.05433); the rest is in bf16. `reduce` is the format in which
    sharded gradients are summed. The `loss_scale`s are fp16's."""

    compute: Compute = "fp32"
    reduce: Literal["fp32", "bf16"] = "fp32"
    emulate: bool = False  # fp8 by rounding alone, on any device: to try a run, slowly
    loss_scale: float = 65536.0  # the first; halved at an overflow
    loss_scale_interval: int = 2000  # steps without overflow until it is doubled

    def __post_init__(self) -> None:
        does_nothing = f"emulates fp8, and compute = {self.compute!r}; use fp8, or leave it out"
        demand(self.compute == "fp8" or not self.emulate, "emulate", self.emulate, does_nothing)
        demand(self.loss_scale > 0, "loss_scale", self.loss_scale, "is not positive; use 65536")
        demand_sizes(self, least=1, loss_scale_interval=1 << 40)


def check_fp8(precision: Precision, sizes: Mapping[str, int], *, tensor: int) -> None:
    """Whether layers of these sizes, each cut over `tensor` ranks, can be multiplied in the format. Raises
    RecipeError."""
    unit = FP8_UNIT * tensor
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size % unit]
    if precision.compute == "fp8" and wrong:
        text = f"= 'fp8' needs layers in multiples of 16 × parallel.tensor = {unit}, unlike {wrong[0]}"
        raise RecipeError("precision.compute", f"{text}; change that, or use bf16")


def refuse_fp8(precision: Precision, reason: str) -> None:
    """Raise RecipeError where the format is fp8."""
    if precision.compute == "fp8":
        raise RecipeError("precision.compute", f"= 'fp8' {reason}; use bf16")


def check_gpu_types(precision: Precision, gpu_types: Sequence[str]) -> None:
    """Whether one of these may compute in the format; of an unknown type nobody knows. No types: the job gets the CPU.
    Raises RecipeError."""
    if precision.compute == "fp8" and not precision.emulate and all(_lacks_fp8(name) for name in gpu_types):
        where = f"{' and '.join(gpu_types)} cannot" if gpu_types else "the job asks for no GPU"
        raise RecipeError("precision.compute", f"= 'fp8' needs GPUs that compute in it, and {where}; {OTHERWISE}")


def _lacks_fp8(gpu_type: str) -> bool:
    try:
        return devices.find(gpu_type).fp8_flops is None
    except ValueError:
        return False
