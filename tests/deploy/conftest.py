"""The rendered chart, once for each variation of its values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
from rendered import VARIATIONS, Document, render


@pytest.fixture(scope="session")
def charts() -> dict[str, list[Document]]:
    return {name: render(values) for name, values in VARIATIONS.items()}


@pytest.fixture(params=VARIATIONS)
def documents(request: pytest.FixtureRequest, charts: dict[str, list[Document]]) -> list[Document]:
    return charts[request.param]


@pytest.fixture
def default(charts: dict[str, list[Document]]) -> list[Document]:
    return charts["defaults"]
