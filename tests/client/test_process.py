"""The command as a process against a server on a socket: signals and terminals, which no test double has."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_server import AT, JOB_ID, job

DEADLINE_S = 20.0
DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
PROGRESS = {"step": 42, "total_steps": 100, "values": {"loss": 2.5}, "at": AT}


class Handler(BaseHTTPRequestHandler):
    """A job that runs until the server is told that it has ended."""

    server: RunningJob

    def do_GET(self) -> None:
        if self.path.startswith(f"/v1/jobs/{JOB_ID}/metrics"):
            return self._answer({"series": []})
        if self.path.startswith(f"/v1/jobs/{JOB_ID}/events"):
            return self._answer({"title": "no stream here", "code": "not_found"}, 404)
        self._answer(job(self.server.state, progress=PROGRESS))

    def do_HEAD(self) -> None:
        """It has every bundle."""
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(job("running"), 201)

    def _answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class RunningJob(ThreadingHTTPServer):
    daemon_threads = True
    state = "running"


@pytest.fixture
def running() -> Iterator[RunningJob]:
    server = RunningJob(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def environment(server: RunningJob) -> dict[str, str]:
    url = f"http://127.0.0.1:{server.server_port}"
    return {**os.environ, "PHALANX_URL": url, "PHALANX_TOKEN": "t", "TERM": "xterm"}


def follow(server: RunningJob, directory: Path, **streams: int) -> subprocess.Popen[bytes]:
    (directory / "job.yaml").write_text("name: lm\n")
    words = [sys.executable, "-m", "phalanx", "submit", str(directory / "job.yaml"), "--follow"]
    return subprocess.Popen(words, env=environment(server), stdout=subprocess.PIPE, **streams)


def read_until(descriptor: int, wanted: bytes) -> bytes:
    """Read until `wanted` has come; fails after DEADLINE_S."""
    seen, deadline = b"", time.monotonic() + DEADLINE_S
    while wanted not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(descriptor, 4096) if ready else b""
        assert piece, f"{wanted!r} did not come: {seen!r}"
        seen += piece
    return seen


def test_ctrl_c_stops_following_and_says_how_to_go_on(running: RunningJob, tmp_path: Path) -> None:
    process = follow(running, tmp_path, stderr=subprocess.PIPE)
    assert process.stderr is not None
    read_until(process.stderr.fileno(), b"running\n")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130 and stdout == b""
    assert stderr.decode().endswith(
        f"stopped following; lm goes on. See it with: phalanx show {JOB_ID}; end it with: phalanx cancel {JOB_ID}\n"
    )


def test_ctrl_c_ends_the_demo_without_a_traceback(running: RunningJob) -> None:
    process = subprocess.Popen(
        [sys.executable, DEMO], env=environment(running), stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr is not None
    read_until(process.stderr.fileno(), b"running\n")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all that run in it
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert stderr.count(b"\n") == 1 and b"stopped following; lm goes on" in stderr


def test_on_a_terminal_the_display_is_live_and_the_summary_stays(running: RunningJob, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = follow(running, tmp_path, stderr=end)
    os.close(end)
    shown = read_until(terminal, b"step 42/100")
    running.state = "succeeded"
    stdout, _ = process.communicate(timeout=DEADLINE_S)
    os.close(terminal)
    assert process.returncode == 0
    assert b"\x1b[" in shown and "━".encode() in shown
    assert b"lm succeeded" in stdout and b"\x1b[" not in stdout
