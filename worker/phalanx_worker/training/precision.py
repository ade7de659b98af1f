"""Number formats: autocast, FSDP's mixed precision, torchao's fp8 layers, and the loss scale that fp16 needs.

Owns what a device can do. It refuses to know which layout is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from phalanx.recipes import devices
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.precision import OTHERWISE, Precision
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8's: of all but its layers


def use_autocast(module: nn.Module, precision: Precision, device: torch.device) -> None:
    """Run the module's forward, and it alone, in the format to compute in."""
    if precision.compute in FORMATS:
        module.forward = torch.autocast(device.type, FORMATS[precision.compute])(module.forward)


def use_fp8(blocks: Iterable[nn.Module], precision: Precision, device: torch.device) -> None:
    """Multiply in fp8 in all linear layers of the blocks, where that is what to compute in. Parameters and their names
    stay as they are; to be called before anything cuts them. Raises RecipeError where the device cannot."""
    if precision.compute != "fp8":
        return
    if not precision.emulate and not has_fp8(device):
        has = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        text = f"= 'fp8' needs a GPU of compute capability 8.9 or more, and this rank has {has}; {OTHERWISE}"
        raise RecipeError("precision.compute", text)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # here, as it takes seconds to import

    config = Float8LinearConfig(emulate=precision.emulate, pad_inner_dim=True)  # tokens need not be a multiple of 16
    for block in blocks:
        convert_to_float8_training(block, config=config)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in fp8: by the table of devices, or by compute capability where that has none."""
    if device.type != "cuda":
        return False
    known = devices.of_product(torch.cuda.get_device_name(device))
    if known is not None:
        return known.fp8_flops is not None
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def sharded_policy(precision: Precision) -> MixedPrecisionPolicy:
    """The same for `fully_shard`, which also gathers parameters in that format."""
    if precision.compute not in FORMATS:
        return MixedPrecisionPolicy()
    reduce = FORMATS.get(precision.reduce, torch.float32)
    return MixedPrecisionPolicy(param_dtype=FORMATS[precision.compute], reduce_dtype=reduce)


class LossScale:
    """Keeps small fp16 gradients from vanishing: the loss is multiplied by `scale` before backward and the gradients
    divided by it after; a step whose gradients overflowed is skipped and halves the scale, `interval` good ones in a
    row double it (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). Fixed at 1 in other formats.

    `torch.amp.GradScaler` decides per optimizer and rank; a gang needs one decision, also where replicas train alone
    and only one of them overflows.
    """

    def __init__(self, precision: Precision) -> None:
        self.active = precision.compute == "fp16"
        self.scale = precision.loss_scale if self.active else 1.0
        self._interval = precision.loss_scale_interval
        self._good = 0

    def accept(self, *, finite: bool) -> bool:
        """Whether to take a step whose loss and gradients are `finite` on all ranks, or not; adapts the scale."""
        if not self.active:
            return True
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self._good % self._interval == 0:
            self.scale *= 2
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self._good = float(state["scale"]), int(state["good"])
