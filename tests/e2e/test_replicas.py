"""Two real servers on one database: when one is killed, the other has all that it acknowledged, and nothing twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import phalanx
import pytest
from phalanx_server.actions.bootstrap import bootstrap
from sqlalchemy.ext.asyncio import AsyncEngine

START_TIMEOUT_S = 60.0
SUBMITTERS = 4
ACKNOWLEDGED_BEFORE = 40
JOB = {"name": "asked", "tenant": "default", "held": True, "resources": {"gpus": 1}, "run": {"command": "true"}}


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def server(database: str, data: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PHALANX_DATABASE_URL": database, "PHALANX_DATA_DIR": str(data)}
    argv = [sys.executable, "-m", "phalanx", "server", "--port", str(port)]
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        running = Server(f"http://127.0.0.1:{port}", process)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(running):
            assert time.monotonic() < deadline_s and process.poll() is None, "a server does not come up"
            time.sleep(0.05)
        yield running
    finally:
        process.kill()
        process.wait()


def is_ready(running: Server) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{running.url}/readyz", timeout=2).status_code == 200
    return False


@dataclass
class Submitted:
    """By idempotency key: the job that was acknowledged, or nothing where no answer came."""

    token: str
    acknowledged: dict[str, str] = field(default_factory=dict)
    in_doubt: list[str] = field(default_factory=list)

    def submit_until_it_fails(self, url: str) -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {self.token}"}, timeout=30) as client:
            while not self.in_doubt:
                key = uuid.uuid4().hex
                try:
                    answer = client.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": key})
                except httpx.TransportError:
                    self.in_doubt.append(key)
                    return
                assert answer.is_success, answer.text
                self.acknowledged[key] = answer.json()["id"]


def kill_while_it_is_asked(running: Server, submitted: Submitted) -> None:
    ask = [threading.Thread(target=submitted.submit_until_it_fails, args=[running.url]) for _ in range(SUBMITTERS)]
    for thread in ask:
        thread.start()
    while len(submitted.acknowledged) < ACKNOWLEDGED_BEFORE:
        assert any(thread.is_alive() for thread in ask)
        time.sleep(0.001)
    running.process.kill()
    for thread in ask:
        thread.join()


@pytest.mark.slow
async def test_what_a_killed_server_acknowledged_is_on_the_other_and_sent_again_it_is_the_same(
    database: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    tokens = await bootstrap(engine)
    assert tokens is not None
    with server(database, tmp_path) as first, server(database, tmp_path) as second:
        submitted = Submitted(tokens.admin_token)
        kill_while_it_is_asked(first, submitted)
        assert submitted.in_doubt, "it was killed while it was asked"
        with phalanx.Client(second.url, tokens.admin_token) as client:
            for key, job_id in submitted.acknowledged.items():
                assert client.submit(JOB, idempotency_key=key).id == job_id
            asked = {client.submit(JOB, idempotency_key=key).id for key in submitted.in_doubt}
            assert {job.id for job in client.jobs()} == asked | set(submitted.acknowledged.values())
