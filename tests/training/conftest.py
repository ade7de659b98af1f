"""The gang that the tests of layouts share: results of a list of cases, computed once per session."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out

import training_gang


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As `torchrun` gives a rank: for models this small, several wait for each other most of the time."""
    torch.set_num_threads(1)


@functools.cache
def _computed(cases: str, ranks: int):
    return training_gang.curves(json.loads(cases), ranks=ranks)


@pytest.fixture(scope="session")
def computed():
    """`computed(cases, ranks=2)`: what became of each case, by its name."""

    def compute(cases, *, ranks):
        return dict(zip(cases, _computed(json.dumps(list(cases.values())), ranks), strict=True))

    return compute
