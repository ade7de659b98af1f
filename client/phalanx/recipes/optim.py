"""The optimizer, its learning-rate schedule and gradient clipping. Standard library only.

Owns the schedules' arithmetic: `Schedule.factor(step)` is a pure function of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from phalanx.recipes.parse import demand, demand_sizes

OptimizerName = Literal["adamw", "adafactor", "sgd", "lamb"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over time, as a factor of the peak: linear warm-up over `warmup` steps, then `shape` down to
    `floor` at the last step. `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at the peak and
    falls linearly over the last `decay_share` of the steps."""

    shape: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: int = 0
    floor: float = 0.1
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        demand_sizes(self, least=0, warmup=1 << 40)
        demand(0 <= self.floor <= 1, "floor", self.floor, "is a share of the peak; use a number from 0 to 1")
        demand(0 < self.decay_share <= 1, "decay_share", self.decay_share, "is a share; use a number in (0, 1]")

    def factor(self, step: int, *, steps: int) -> float:
        """The factor for the `step`-th update (from 1) of `steps`."""
        if step <= self.warmup:
            return step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.floor + (1 - self.floor) * self._remaining(done)

    def _remaining(self, done: float) -> float:
        """How much of the way above the floor is left, from 1 to 0, when a share `done` of the steps after the warm-up
        is over."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "linear":
            return 1 - done
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return min(1.0, (1 - done) / self.decay_share)


@dataclass(frozen=True)
class Optim:
    """`momentum` is sgd's (Nesterov's where `nesterov`); `betas` and `eps` are adamw's and lamb's. Weight decay is for
    matrices only, never for norms and biases. `clip` is the largest global gradient norm; 0 leaves gradients alone."""

    name: OptimizerName = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = True
    clip: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        demand(self.lr > 0, "lr", self.lr, "is not positive; use a number such as 3e-4")
        demand(self.weight_decay >= 0, "weight_decay", self.weight_decay, "is negative; use 0 or more")
        demand(self.clip >= 0, "clip", self.clip, "is negative; use 0 (off) or a norm such as 1.0")
        demand(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "are not all in [0, 1); use [0.9, 0.95]")
        demand(0 <= self.momentum < 1, "momentum", self.momentum, "is not in [0, 1); use 0.9")
