"""The warm process where torch does not load."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import warm as warm_module
from phalanx_worker.node.warm import WarmProcess

pytestmark = pytest.mark.asyncio(loop_scope="session")

INTERPRETER = """#!/bin/sh
echo life >> {0}/lives
case "$*" in *--no-torch*) exec {1} "$@";; esac
[ -e {0}/mended ] && exec {1} "$@" --no-torch
{2}
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_module, "_BACKOFF_S", (0.001, 0.01))
    monkeypatch.setattr(warm_module, "_WITHOUT_TORCH_S", (0.3, 1.0))
    monkeypatch.setattr(warm_module, "READY_TIMEOUT_S", 5.0)


@pytest.mark.parametrize(("broken", "ready_s"), [("exit 1", 5.0), ("exec sleep 60", 0.5)], ids=["dies", "hangs"])
async def test_torch_is_tried_again_while_nothing_is_forked(
    impatient: None, monkeypatch: pytest.MonkeyPatch, light_python: Any, tmp_path: Path, broken: str, ready_s: float
) -> None:
    monkeypatch.setattr(warm_module, "READY_TIMEOUT_S", ready_s)
    python, env = light_python
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(tmp_path, python, broken))
    interpreter.chmod(0o755)
    warm, ready = WarmProcess(python=str(interpreter), env=env, log_path=tmp_path / "log"), asyncio.Event()
    warm.start(on_ready=ready.set)
    try:
        await asyncio.wait_for(ready.wait(), 20)
        assert (tmp_path / "lives").read_text().count("life") == 4  # three with torch, one without
        (tmp_path / "mended").touch()
        ready.clear()
        await asyncio.wait_for(ready.wait(), 20)
        assert warm._deaths == 0  # it was a life with torch
    finally:
        await warm.close()
