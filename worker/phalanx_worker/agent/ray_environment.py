"""What Ray reads from the environment when it is imported, set for this process. So this module imports no Ray."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RAY_FILE_TIMEOUT_S = 60.0
POLL_S = 0.05

# Of a cluster on this machine alone. Its GCS is back within seconds when it was killed, so whoever misses it for longer
# ends, and not after Ray's 60 s. The second has a name of another time: without it Ray turns a loopback address into
# the machine's own, where a cluster on loopback does not listen.
LOOPBACK_SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def read_ray_file(path: Path, timeout_s: float = RAY_FILE_TIMEOUT_S) -> str:
    """The address in the `ray.json` of a running `phalanx local-ray`, waiting for it; sets Ray's token for us.

    Raises TimeoutError, and PermissionError where the file is another user's.
    """
    deadline_s = time.monotonic() + timeout_s
    while (facts := _running(path)) is None:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no local Ray cluster wrote {path} within {timeout_s:.0f} s: is it up?")
        time.sleep(POLL_S)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=facts["token_path"])
    return facts["address"]


def _running(path: Path) -> dict[str, Any] | None:
    """What the file says, unless it is missing or was left behind by a cluster that was killed."""
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return facts if _exists(facts["pid"]) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return True


def prepare(address: str) -> None:
    """Call before the first import of Ray."""
    if address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        os.environ.update(LOOPBACK_SETTINGS)
