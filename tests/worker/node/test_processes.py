"""Processes as the kernel shows them."""

from __future__ import annotations

import subprocess
import sys

from phalanx_worker.node import processes

_HOLDS = "import time; block = bytearray(1 << 28); print(flush=True); time.sleep(60)"


def test_a_process_that_gives_its_memory_back_is_seen_to_be_dying() -> None:
    """Or the rank that the kernel ended would look like the one that holds the least."""
    with subprocess.Popen([sys.executable, "-c", _HOLDS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.resident_bytes([process.pid]) > 0
        assert not processes.is_dying(process.pid)
        process.kill()
        is_dying = False
        while not is_dying:
            held = processes.resident_bytes([process.pid])
            is_dying = processes.is_dying(process.pid)
            assert is_dying or held > 0
