"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 to 6) over parameters as they lie: whole, or
DTensors over any mesh.

Owns this one optimizer. It computes what `torch.optim.Adafactor` (2.13) does, which takes whole parameters alone: it
changes norms in place that are still to be summed over ranks. State has the same names, so that checkpoints of either
can be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

DECAY = -0.8  # of what second moments forget, as a power of the step
LEAST_SIZE = 1e-3  # of a parameter, to which its update is relative


class Adafactor(torch.optim.Optimizer):
    """Second moments of matrices are kept as their mean per row and per column (of the last two dimensions), all of it
    in the layout of the gradient: only these means, and the size of a parameter and of its update, cross ranks."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, lr=group["lr"], decay=group["weight_decay"])

    def _update(self, parameter: Tensor, grad: Tensor, *, lr: float, decay: float) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1
        step, least = float(state["step"]), torch.finfo(grad.dtype).eps
        _remember(state, grad.square(), new=step**DECAY)
        update = grad * _second_moments(state, least).clamp(min=least**2).rsqrt()
        rate = min(lr, step**-0.5) * _size(parameter).clamp(min=LEAST_SIZE) / _size(update).clamp(min=1.0)
        parameter.mul_(1 - lr * decay)
        parameter.sub_(rate * update)


def _remember(state: dict[str, Any], square: Tensor, *, new: float) -> None:
    """Let the kept means go towards those of `square`, by the share `new` (1 in the first step)."""
    factored = square.ndim > 1
    means = {"row_var": _mean(square, -1), "col_var": _mean(square, -2)} if factored else {"variance": square}
    for name, mean in means.items():
        state[name] = state[name].lerp_(mean, new) if name in state else mean


def _second_moments(state: dict[str, Any], least: float) -> Tensor:
    if "variance" in state:
        return state["variance"]
    rows = state["row_var"]
    return rows / _mean(rows, -2).clamp(min=least) * state["col_var"]


def _mean(values: Tensor, dim: int) -> Tensor:
    return summed(values.sum(dim, keepdim=True)) / values.shape[dim]  # `mean` would gather uneven parts


def _size(values: Tensor) -> Tensor:
    """The root of the mean square of all."""
    return (summed(values.square().sum()) / values.numel()).sqrt()


def summed(values: Tensor) -> Tensor:
    """The same, where each rank has a part of a sum, summed over them. Collective for DTensors."""
    if not isinstance(values, DTensor):
        return values
    return values.redistribute(placements=[Replicate() if p.is_partial() else p for p in values.placements])
