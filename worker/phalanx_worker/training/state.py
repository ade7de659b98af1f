"""The model's and the optimizers' state under layout-independent names: a parameter has the name that it has in the
whole model, and DTensors say which part of it a rank holds. So a checkpoint can be read back into another layout.

Owns the names. It refuses to know where and how state is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # one entry per parameter and value, whatever the groups


class ModelState:
    """The parameters of this rank's stages."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def state_dict(self) -> dict[str, Any]:
        return {name: value for module in self._modules for name, value in get_model_state_dict(module).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for module in self._modules:
            own = {name: state[name] for name in get_model_state_dict(module)}
            set_model_state_dict(module, own)


class OptimizerState:
    """What the optimizers of these stages keep, by parameter."""

    def __init__(self, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._pairs = list(zip(modules, optimizers, strict=True))

    def state_dict(self) -> dict[str, Any]:
        states = (get_optimizer_state_dict(module, optimizer, options=FLAT) for module, optimizer in self._pairs)
        return {name: value for state in states for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for module, optimizer in self._pairs:
            own = {name: state[name] for name in get_optimizer_state_dict(module, optimizer, options=FLAT)}
            set_optimizer_state_dict(module, optimizer, own, options=FLAT)
