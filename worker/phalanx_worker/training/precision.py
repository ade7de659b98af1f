"""Number formats: autocast, FSDP's mixed precision, and the loss scale that fp16 needs.

Owns what a device can do. It refuses to know which layout is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from phalanx.recipes.precision import Precision
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def use_autocast(module: nn.Module, precision: Precision, device: torch.device) -> None:
    """Run the module's forward, and it alone, in the format to compute in."""
    if precision.compute in FORMATS:
        module.forward = torch.autocast(device.type, FORMATS[precision.compute])(module.forward)


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

    `torch.amp.GradScaler` decides per optimizer and rank; a gang needs one decision, and has it for nothing: the global
    gradient norm is finite on all ranks or on none.
    """

    def __init__(self, precision: Precision) -> None:
        self.active = precision.compute == "fp16"
        self.scale = precision.loss_scale if self.active else 1.0
        self._interval = precision.loss_scale_interval
        self._good = 0

    def accept(self, norm: Tensor) -> bool:
        """Whether to take a step whose gradients have this global norm; adapts the scale."""
        if not self.active:
            return True
        finite = bool(norm.isfinite())
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
