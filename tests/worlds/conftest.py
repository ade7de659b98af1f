"""The control planes that worlds are made of; the other files of this folder are modules of its tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from phalanx_server.store.engine import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
from control_plane import ControlPlane


@pytest.fixture
async def plane(engine: AsyncEngine, tmp_path: Path) -> ControlPlane:
    """One cluster, one tenant; no node yet."""
    return await ControlPlane(engine, tmp_path / "one").open()


@pytest.fixture
async def other_plane(other_database: str, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """The same on a database of its own."""
    engine = create_engine(other_database)
    yield await ControlPlane(engine, tmp_path / "other").open()
    await engine.dispose()
