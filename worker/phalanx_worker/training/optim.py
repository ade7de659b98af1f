"""Optimizers, the learning rate over time, and clipping that is right under every layout.

Owns the update. It takes parameters as they lie (whole, DTensors over any mesh, a pipeline stage's own) and knows no
model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from phalanx.recipes.optim import Optim
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from phalanx_worker.training.adafactor import Adafactor, summed


def make_optimizer(optim: Optim, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of one module: weight decay for matrices, none for vectors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return _KINDS[optim.name](optim, [group for group in groups if group["params"]])


def _adamw(optim: Optim, groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _adafactor(optim: Optim, groups: list[dict]) -> torch.optim.Optimizer:
    return Adafactor(groups, lr=optim.lr)


def _sgd(optim: Optim, groups: list[dict]) -> torch.optim.Optimizer:
    nesterov = optim.nesterov and optim.momentum > 0
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov)


def _lamb(optim: Optim, groups: list[dict]) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb  # here, as it takes seconds to import

    lamb = Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    lamb.step = _with_whole_norms(lamb)
    return lamb


LAMBS_RECORDS = ("weight_norm", "adam_norm", "trust_ratio")
"""What the library's LAMB notes of its last step and never reads. On shards these are slices of one tensor, which torch
(2.13) cannot copy for a checkpoint that is written while training goes on."""


class _WholeNorms(TorchFunctionMode):
    """While active, norms are those of whole parameters at once, and not parts that are summed up when used: pytorch-
    optimizer (4.1) changes them in place, which a part (torch 2.13) refuses."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(DTensor, summed, func(*args, **(kwargs or {})))


def _with_whole_norms(lamb: torch.optim.Optimizer) -> Callable:
    """Its step, which leaves no record of itself."""
    step = lamb.step

    @wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        with _WholeNorms():
            loss = step(*args, **kwargs)
        for state in lamb.state.values():
            for name in LAMBS_RECORDS:
                state.pop(name, None)
        return loss

    return stepped


_KINDS = {"adamw": _adamw, "adafactor": _adafactor, "sgd": _sgd, "lamb": _lamb}


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all groups: a function of the step, so there is nothing to resume."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def global_norm(parameters: Iterable[nn.Parameter], stages: dist.ProcessGroup | None) -> Tensor:
    """The 2-norm of the whole model's gradient, the same on every rank: an fp32 scalar. `stages` are the ranks that
    hold the other stages of the pipeline."""
    parts = [get_total_norm(grads) for grads in _alike(p.grad for p in parameters).values()]
    squares = [_whole(part).float().square() for part in parts]
    total = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def clip(parameters: Iterable[nn.Parameter], *, norm: Tensor, limit: float) -> None:
    """Scale all gradients by `limit` / `norm` where the norm is above the limit (Pascanu et al. 2013,
    arXiv:1211.5063)."""
    by_kind: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_kind[_kind(parameter.grad)].append(parameter)
    for alike in by_kind.values():
        clip_grads_with_norm_(alike, limit, norm)


def divide(parameters: Iterable[nn.Parameter], divisor: float) -> None:
    """Divide all gradients in place."""
    for alike in _alike(p.grad for p in parameters).values():
        torch._foreach_div_(alike, divisor)  # pyright: ignore[reportPrivateImportUsage]


def _alike(grads: Iterable[Tensor | None]) -> dict[object, list[Tensor]]:
    """The gradients in groups that one operation can take together."""
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        if grad is not None:
            groups[_kind(grad)].append(grad)
    return groups


def _kind(grad: Tensor) -> object:
    return (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else grad.device


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
