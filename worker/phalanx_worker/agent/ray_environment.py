"""What Ray reads from the environment when it is imported, set for this process. So this module imports no Ray."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

RAY_FILE_TIMEOUT_S = 60.0

# Without this Ray turns a loopback address into the machine's own, where a cluster on loopback does not listen. Its
# name is of another time: "0" means that this process's node address is 127.0.0.1.
LOOPBACK_SETTINGS = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def read_ray_file(path: Path) -> str:
    """The address in a `ray.json` that `phalanx local-ray` wrote, waiting for it to appear; sets Ray's token.

    Raises TimeoutError.
    """
    deadline_s = time.monotonic() + RAY_FILE_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{path} did not appear within {RAY_FILE_TIMEOUT_S:.0f} s: is the local Ray cluster up?")
        time.sleep(0.05)
    facts = json.loads(path.read_text())
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=facts["token_path"])
    return facts["address"]


def prepare(address: str) -> None:
    """Call before the first import of Ray."""
    if address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        os.environ.update(LOOPBACK_SETTINGS)
