"""Runs with known constants: synthetic ones, and jobs of a real server whose cluster is only played."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from phalanx_server.scaling.fit import Sample
from phalanx_server.scaling.law import Law
from phalanx_server.scaling.runs import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))  # --import-mode=importlib leaves it out

HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)

Runs = Callable[..., list[Run]]


def make_runs(
    law: Law = HOFFMANN,
    *,
    sizes: int = 5,
    counts: int = 5,
    noise: float = 0.0,
    seed: int = 0,
    parameters: tuple[float, float] = (7e7, 1e10),
    tokens: tuple[float, float] = (1e9, 3e11),
) -> list[Run]:
    """A grid of runs; `noise` is the deviation of log loss."""
    random = np.random.default_rng(seed)
    grid = [(n, d) for n in np.geomspace(*parameters, sizes) for d in np.geomspace(*tokens, counts)]
    return [
        Run(f"lm-{i}", n, d, float(law.loss(n, d)) * math.exp(noise * random.standard_normal()), 6 * n * d)
        for i, (n, d) in enumerate(grid)
    ]


def make_sample(**given: object) -> Sample:
    from phalanx_server.scaling.runs import sample_of

    return sample_of(make_runs(**given))  # type: ignore[arg-type]


@pytest.fixture
def runs() -> Runs:
    return make_runs


@pytest.fixture
def samples() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture
def hoffmann() -> Law:
    return HOFFMANN
