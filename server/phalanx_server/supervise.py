"""Child processes of `phalanx up`: start, watch, start again, stop. Knows nothing of what they do.

Each child has a session of its own, so that a Ctrl-C in the terminal reaches only the parent, which then stops them in
order; and each gets SIGTERM from the kernel should the parent die without a word.
"""

import ctypes
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STOP_TIMEOUT_S = 10.0
COMMAND_GRACE_S = 5.0
RESTART_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class ChildFailed(RuntimeError):
    """A child ended before it was ready. The message ends with the last lines of its log."""


@dataclass
class Child:
    """One supervised process; its output goes to `log`."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen | None = None
    restarts: int = 0
    restart_at: float = field(default=0.0)

    def start(self) -> None:
        parent = os.getpid()

        def follow_parent() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=follow_parent,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL to the whole session after `timeout_s`."""
        if self.process is None:
            return
        if self.alive:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def expect_alive(self) -> None:
        """Raise ChildFailed if it has ended."""
        if not self.alive:
            code = self.process.returncode if self.process else None
            raise ChildFailed(f"{self.name} ended with exit code {code}; the end of {self.log}:\n{self.tail()}")


@dataclass
class Family:
    """The children in the order of their start; they are stopped in reverse."""

    children: list[Child] = field(default_factory=list)

    def start(self, child: Child) -> Child:
        self.children.append(child)
        child.start()
        return child

    def tick(self, now_s: float) -> None:
        """Start again whoever has died, after a backoff that grows with each restart. `now_s` is monotonic."""
        for child in self.children:
            if child.alive:
                continue
            if not child.restart_at:
                child.restart_at = now_s + RESTART_BACKOFF_S[min(child.restarts, len(RESTART_BACKOFF_S) - 1)]
            elif now_s >= child.restart_at:
                child.restarts += 1
                child.restart_at = 0.0
                child.start()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop all, last started first."""
        for child in reversed(self.children):
            child.stop(timeout_s)
        self.children.clear()


def end(process: subprocess.Popen) -> None:
    """SIGTERM, and SIGKILL if that did not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(COMMAND_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until(ready, *, timeout_s: float, what: str, poll_s: float = 0.05) -> None:
    """Call `ready` until it is true; it may raise to give up early. TimeoutError names `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} was not ready after {timeout_s:.0f} s")
        time.sleep(poll_s)
