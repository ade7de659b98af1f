"""The guardian's hold over processes, without a group."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from phalanx_worker import protocol


def test_a_process_that_became_anothers_does_not_stop_its_guardian() -> None:
    """As by sudo, where ranks run as the runner's user and that is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root makes a process that its guardian may not end")
    victim = subprocess.Popen(["sleep", "60"])
    code = f"from phalanx_worker.runtime.guard import Guardian; Guardian._kill([{victim.pid}, os.getpid()])"
    sources = [Path(protocol.__file__).parents[1], Path(protocol.__file__).parents[2] / "client"]
    env = {"PYTHONPATH": ":".join(map(str, sources))}
    try:
        nobody = subprocess.run(["python3", "-c", f"import os; {code}"], env=os.environ | env, user=65534, check=False)
        assert nobody.returncode == -signal.SIGKILL, "it went on to the next"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
