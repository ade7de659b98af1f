"""A whole Phalanx for the tests of this folder: `phalanx up` as a process, spoken to through its real interface."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import phalanx
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out

COOKIE = "PHALANX_TEST_COOKIE"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@dataclass
class Up:
    """One `phalanx up` on `data`; everything that it starts carries a cookie in its environment."""

    data: Path
    nodes: int = 2
    gpus_per_node: int = 2
    cookie: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen | None = None

    def start(self, *command: str) -> "Up":
        size = ["--nodes", str(self.nodes), "--gpus-per-node", str(self.gpus_per_node)]
        argv = [sys.executable, "-m", "phalanx", "up", "--data", str(self.data), "--port", "0", *size]
        if command:
            argv += ["--", *command]
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, COOKIE: self.cookie},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self

    def wait_up(self) -> "Up":
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.url_file.exists():
            if self.process.poll() is not None:
                raise AssertionError(
                    f"phalanx up ended with {self.process.returncode}:\n{self.process.communicate()[0]}"
                )
            assert time.monotonic() < deadline, "phalanx up did not come up"
            time.sleep(0.1)
        return self

    @property
    def url_file(self) -> Path:
        return self.data / "url"

    @property
    def environment(self) -> dict[str, str]:
        token = (self.data / "admin-token").read_text().strip()
        return {"PHALANX_URL": self.url_file.read_text().strip(), "PHALANX_TOKEN": token}

    def client(self) -> phalanx.Client:
        env = self.environment
        return phalanx.Client(env["PHALANX_URL"], env["PHALANX_TOKEN"])

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the `phalanx` command against it."""
        return subprocess.run(
            [sys.executable, "-m", "phalanx", *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=check,
        )

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Send it `number` as a terminal does a Ctrl-C, to its whole process group; its exit code and output."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        output, _ = self.process.communicate(timeout=STOP_TIMEOUT_S)
        return self.process.returncode, output

    def left_over(self) -> list[str]:
        """Command lines of processes that it started and that still live."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                mine = f"{COOKIE}={self.cookie}".encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if mine and state != "Z":
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found


def new_directory() -> Path:
    """A short path: Unix sockets live in it."""
    return Path(tempfile.mkdtemp(prefix="phx-e2e-"))


@pytest.fixture
def machine() -> Iterator[Up]:
    """A Phalanx of one node that is not started yet, on a directory of its own."""
    machine = Up(new_directory(), nodes=1)
    yield machine
    if machine.process and machine.process.poll() is None:
        machine.stop(signal.SIGTERM)
    shutil.rmtree(machine.data, ignore_errors=True)


@pytest.fixture
def second(machine: Up) -> Up:
    """Another one on the same directory."""
    return Up(machine.data, nodes=1)


@contextmanager
def whole_phalanx(nodes: int = 2, gpus_per_node: int = 2, *, mode: int = 0o700) -> Iterator[Up]:
    """A running Phalanx; its end is checked too. `mode` 0o755 lets ranks reach their directories as other users."""
    machine = Up(new_directory(), nodes, gpus_per_node)
    machine.data.chmod(mode)
    machine.start()
    try:
        machine.wait_up()
        yield machine
    finally:
        machine.stop()
    assert machine.left_over() == []
    shutil.rmtree(machine.data, ignore_errors=True)


@pytest.fixture(scope="session")
def make_up() -> Callable[..., AbstractContextManager[Up]]:
    return whole_phalanx


@pytest.fixture(scope="module")
def up(make_up: Callable[..., AbstractContextManager[Up]]) -> Iterator[Up]:
    """A running Phalanx for the tests of one module: it would get in the way of the tests after them."""
    with make_up() as machine:
        yield machine


@pytest.fixture
def client(up: Up) -> Iterator[phalanx.Client]:
    with up.client() as client:
        yield client
