"""Infrequent synchronisation: replicas train alone and meet every so many steps (DiLoCo, Douillard et al. 2023,
arXiv:2311.08105, algorithm 1; local SGD is its special case).

Owns the common parameters and the outer momentum. Each rank keeps those of the part of the model that it holds. The
replicas' own optimizers differ; a checkpoint holds one replica's, which all go on from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from phalanx.recipes.parallel import LocalSteps
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Outer:
    """The outer optimizer: SGD with Nesterov momentum on the mean way that the replicas went since they last met. A
    single one (no `group`) meets itself, so that it can go on as one of several and from several."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], config: LocalSteps, group: dist.ProcessGroup | None
    ) -> None:
        self._every = config.every
        self._group = group
        self._own = {name: parameter.detach() for name, parameter in named}
        self._common = {name: nn.Parameter(own.clone()) for name, own in self._own.items()}
        momentum = config.outer_momentum
        self._optimizer = torch.optim.SGD(
            self._common.values(), lr=config.outer_lr, momentum=momentum, nesterov=momentum > 0
        )
        for common in self._common.values():  # zeros, as if it had met before: so there is always a state to load into
            self._optimizer.state[common]["momentum_buffer"] = torch.zeros_like(common)

    def after(self, step: int) -> None:
        """To be called by all replicas after each inner step."""
        if self.has_met(step):
            self.meet()

    def has_met(self, step: int) -> bool:
        """Whether the replicas meet after this step."""
        return step % self._every == 0

    @torch.no_grad()
    def meet(self) -> None:
        """Exchange, take one outer step, and go on from there."""
        for name, common in self._common.items():
            way = common - self._own[name]
            if self._group is not None:
                dist.all_reduce(_local(way), group=self._group)
                way /= self._group.size()
            common.grad = way
        self._optimizer.step()
        for name, common in self._common.items():
            self._own[name].copy_(common)

    def state_dict(self) -> dict[str, Any]:
        """By the parameters' names in the whole model. It is kept right after a meeting, so it is the same on all
        replicas, and what they have in common is the model."""
        return {"momentum": {name: self._momentum_of(common) for name, common in self._common.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Call it when the model has been loaded."""
        for name, common in self._common.items():
            common.copy_(self._own[name])
            self._momentum_of(common).copy_(state["momentum"][name])

    def _momentum_of(self, common: nn.Parameter) -> Tensor:
        return self._optimizer.state[common]["momentum_buffer"]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
