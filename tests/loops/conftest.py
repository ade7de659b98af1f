"""The control plane that these tests drive."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "worlds"))  # --import-mode=importlib leaves it out
from control_plane import ControlPlane


@pytest.fixture
async def plane(engine: AsyncEngine, tmp_path: Path) -> ControlPlane:
    """One cluster, one tenant, a scheduler that leads; no node yet."""
    return await ControlPlane(engine, tmp_path).open()
