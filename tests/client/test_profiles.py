"""`phalanx profile`: asks, waits, and leaves whole traces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import AT, JOB_ID, FakeServer, answer, problem
from phalanx.cli.app import app
from phalanx.client import AsyncClient
from typer.testing import CliRunner, Result

Run = Callable[..., Result]
URL = f"/v1/jobs/{JOB_ID}/profiles"
PROFILE = "prof_0197a1b2c3d47e5f8091a2b3c4d5e6f7"
TRACE = b"trace"


def profile(state: str, *ranks: str, reason: str = "") -> dict[str, Any]:
    digest = hashlib.sha256(TRACE).hexdigest()
    shown = [
        {"rank": 8 * index, "state": rank, "reason": reason if rank == "failed" else "", "bytes": 5, "sha256": digest}
        for index, rank in enumerate(ranks)
    ]
    made = {"id": PROFILE, "job_id": JOB_ID, "attempt": 1, "steps": 5, "state": state, "reason": reason}
    return {**made, "ranks": shown, "created_by": "ada", "created_at": AT}


def becomes(server: FakeServer, *states: dict[str, Any]) -> None:
    server.on(f"POST {URL}", answer(states[0], 202))
    server.on(f"GET {URL}/{PROFILE}", *(answer(state) for state in states))
    for rank in (0, 8):
        server.on(f"GET {URL}/{PROFILE}/ranks/{rank}", httpx.Response(200, content=TRACE))


@pytest.fixture
def run(wired: FakeServer, tmp_path: Path) -> Run:
    def call(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["profile", JOB_ID, "--to", str(tmp_path / "traces"), *words])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


def test_it_asks_waits_and_fetches_every_trace(server: FakeServer, run: Run, tmp_path: Path) -> None:
    both = ("recording", "recording")
    becomes(server, profile("requested", *both), profile("recording", *both), profile("ready", "ready", "ready"))
    said = run("--steps", "7", "--rank", "0", "--rank", "8")
    files = [tmp_path / "traces" / f"{PROFILE}-rank-{rank}.json.gz" for rank in (0, 8)]
    assert said.stdout.split() == [str(file) for file in files]
    assert [file.read_bytes() for file in files] == [TRACE] * 2
    assert "recording 5 steps of ranks 0,8" in said.stderr and "https://ui.perfetto.dev" in said.stderr
    asked = next(request for request in server.requests if request.method == "POST")
    assert json.loads(asked.content) == {"steps": 7, "ranks": [0, 8]} and "idempotency-key" in asked.headers


def test_a_rank_without_a_trace_is_told_beside_the_others(server: FakeServer, run: Run, tmp_path: Path) -> None:
    becomes(server, profile("ready", "ready", "failed", reason="no step"))
    said = run("-o", "json")
    assert json.loads(said.stdout)["files"] == [str(tmp_path / "traces" / f"{PROFILE}-rank-0.json.gz")]
    assert "rank 8 has no trace: no step" in said.stderr
    assert json.loads(server.requests[0].content) == {"steps": 5}


def test_one_that_failed_says_why(server: FakeServer, run: Run) -> None:
    becomes(server, profile("failed", "failed", reason="no step"))
    assert f"{PROFILE} of {JOB_ID} failed: no step" in run(code=1).stderr


def test_a_job_that_does_not_run_is_a_conflict(server: FakeServer, run: Run) -> None:
    server.on(f"POST {URL}", problem(409, "conflict", "x is queued: only a job that runs can be profiled"))
    assert "only a job that runs" in run(code=5).stderr


def test_a_damaged_trace_is_not_left(server: FakeServer, run: Run, tmp_path: Path) -> None:
    becomes(server, profile("ready", "ready"))
    server.on(f"GET {URL}/{PROFILE}/ranks/0", httpx.Response(200, content=b"other"))
    assert "damaged" in run(code=1).stderr
    assert list((tmp_path / "traces").iterdir()) == []


async def test_so_it_is_by_the_async_client(server: FakeServer, async_client: AsyncClient, tmp_path: Path) -> None:
    becomes(server, profile("recording", "recording"), profile("ready", "ready"))
    server.on(f"GET {URL}", answer({"items": [profile("ready", "ready")], "next_cursor": None}))
    made = await async_client.request_profile(JOB_ID, steps=5)
    done = await async_client.wait_profile(JOB_ID, made.id)
    assert [one.state for one in await async_client.profiles(JOB_ID)] == ["ready"] == [done.state]
    (file,) = await async_client.download_traces(JOB_ID, done, tmp_path)
    assert file.read_bytes() == TRACE
