"""The law: L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it in closed form. It owns the formula; it
refuses to know where the five numbers come from.

N: parameters, D: training tokens, L: loss in nats per token. Source: Hoffmann et al. 2022, "Training Compute-Optimal
Large Language Models", https://arxiv.org/abs/2203.15556, equations 2 and 4.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOPS_PER_PARAMETER_TOKEN = 6.0
"""Forward and backward pass of a dense transformer: C = 6 N D (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361,
section 2.1). Leaves out attention over the context."""


@dataclass(frozen=True)
class Law:
    """The five numbers: E is what no model gets below, the others say how fewer parameters and tokens cost."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
        """L of each pair; shapes broadcast."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def best_split(
        self, flops: ArrayLike, *, flops_per_parameter_token: float = FLOPS_PER_PARAMETER_TOKEN
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """N and D with the least loss where k N D = `flops`: N = G (C/k)^a, D = (C/k)^b / G with a = beta / (alpha +
        beta), b = alpha / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)). Equation 4 of the paper."""
        product = np.asarray(flops, dtype=float) / flops_per_parameter_token
        both = self.alpha + self.beta
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return ratio * product ** (self.beta / both), product ** (self.alpha / both) / ratio

    def best_loss(
        self, flops: ArrayLike, *, flops_per_parameter_token: float = FLOPS_PER_PARAMETER_TOKEN
    ) -> NDArray[np.float64]:
        """The least loss that so much compute buys."""
        return self.loss(*self.best_split(flops, flops_per_parameter_token=flops_per_parameter_token))
