"""The warm process: torch imported once, forked into groups for as long as the node lives.

Owns the import, the checks that make a fork safe (one thread, no GPU touched) and the fork of each group's guardian.
Runs with a scrubbed environment and holds no secret, since ranks inherit its memory. Ends when the runner's end of its
socket closes. Started as `python -m phalanx_worker.runtime.boot warm --fd N [--no-torch]`; without torch it still
forks guardians, and every rank then starts cold.
"""

from __future__ import annotations

import sys

STARTUP_MODULES = frozenset(sys.modules)  # before our own imports: what a fresh interpreter has (and runpy's few)

import argparse  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import traceback  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

from phalanx_worker.runtime import channel, guard, linux  # noqa: E402

_PRELOAD = ("torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "torch.utils.data")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="phalanx_worker.runtime.boot")
    parser.add_argument("what", choices=["warm"])
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args(argv)
    sys.path.pop(0)  # the directory that `-m` put there; each rank has its own
    connection = socket.socket(fileno=options.fd)
    connection.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guardians are reaped by the kernel
    state = {"pid": os.getpid(), "python": "{}.{}".format(*sys.version_info)}
    channel.send(connection, {"op": "ready", **state, **preload(wanted=not options.no_torch), "loaded": _loaded()})
    serve(connection)
    return 0


def preload(*, wanted: bool) -> dict[str, Any]:
    """Import what training needs. `torch`: its version or ""; `unfit`: why ranks must not be forked from it, or ""."""
    if not wanted:
        return {"torch": "", "unfit": "torch could not be loaded in the warm process"}
    try:
        for name in _PRELOAD:
            importlib.import_module(name)
    except Exception as error:
        traceback.print_exc()
        return {"torch": "", "unfit": f"torch is not available here: {error}"}
    gc.collect()
    gc.freeze()  # else the collector would touch, and so copy, every page that ranks share with this process
    return {"torch": str(sys.modules["torch"].__version__), "unfit": _unfit()}


def _loaded() -> list[str]:
    """What a fork has already, whatever its environment brings."""
    return sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)


def _unfit() -> str:
    threads = linux.thread_count()
    if threads != 1:
        return f"the warm process has {threads} threads"
    if linux.holds_device("/dev/nvidia"):
        return "the warm process has touched a GPU"
    return ""


def serve(connection: socket.socket) -> None:
    """Fork a guardian for each message, until the runner is gone."""
    while True:
        received = channel.receive(connection)
        if received is None:
            return
        _, fds = received
        pid = os.fork()
        if pid == 0:
            _become_guardian(connection, fds)
        for fd in fds:
            os.close(fd)


def _become_guardian(connection: socket.socket, fds: list[int]) -> NoReturn:
    try:
        connection.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        guardian_fd, spec_fd, *listener = fds
        guard.run(socket.socket(fileno=guardian_fd), spec_fd, next(iter(listener), None), startup=STARTUP_MODULES)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
