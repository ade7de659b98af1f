"""`phalanx wait` against a fake server: what it prints, and how it exits."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_server import JOB_ID, FakeServer, answer, job
from phalanx.cli.app import app
from typer.testing import CliRunner, Result

OTHER_ID = JOB_ID[:-1] + "8"
ARRAY_ID = "array_" + "0" * 31 + "1"


def wait(*words: str, code: int) -> Result:
    result = CliRunner().invoke(app, ["wait", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def array(**states: int) -> dict[str, Any]:
    ended = not states.get("running")
    return {"id": ARRAY_ID, "name": "sweep", "size": sum(states.values()), "states": states, "ended": ended}


def test_it_returns_when_the_job_has_ended_and_has_succeeded(wired: FakeServer) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job("running")), answer(job("succeeded")))
    assert wait(JOB_ID, code=0).stdout == f"lm {JOB_ID} succeeded\n"
    assert len(wired.requests) == 2


def test_one_that_failed_of_several_makes_the_exit_code_1(wired: FakeServer) -> None:
    failed = job("failed", reason="oom", message="rank 1 ran out of memory")
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(failed))
    wired.on(f"GET /v1/jobs/{OTHER_ID}", answer(job("succeeded") | {"id": OTHER_ID}))
    said = wait(JOB_ID, OTHER_ID, code=1).stdout.splitlines()
    assert said == [f"lm {JOB_ID} failed (oom): rank 1 ran out of memory", f"lm {OTHER_ID} succeeded"]


def test_an_array_is_done_when_all_its_jobs_are(wired: FakeServer) -> None:
    wired.on(f"GET /v1/arrays/{ARRAY_ID}", answer(array(running=1, succeeded=1)), answer(array(succeeded=2)))
    assert wait(ARRAY_ID, code=0).stdout == f"sweep {ARRAY_ID}: 2 succeeded\n"
    wired.on(f"GET /v1/arrays/{ARRAY_ID}", answer(array(succeeded=1, cancelled=1)))
    wait(ARRAY_ID, code=1)


def test_the_end_of_the_time_is_said(wired: FakeServer) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job("running")))
    assert wait(JOB_ID, "--timeout", "0s", code=1).stderr == f"error: job {JOB_ID} is still running after 0 s\n"


@pytest.mark.parametrize("state", ["running", None])
def test_of_several_the_time_is_said_that_was_given_and_what_has_ended_is_not_lost(
    wired: FakeServer, monkeypatch: pytest.MonkeyPatch, state: str | None
) -> None:
    monkeypatch.setattr("phalanx.cli.wait.time", SimpleNamespace(monotonic=wired.clock))
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job("running")), answer(job("running")), answer(job("succeeded")))
    other = answer(job(state)) if state else httpx.ConnectError("refused")
    wired.on(f"GET /v1/jobs/{OTHER_ID}", other)
    result = wait(JOB_ID, OTHER_ID, "--timeout", "1s", "-o", "json", code=1)
    said = "running" if state else "out of reach, with its server,"
    assert result.stderr == f"error: job {OTHER_ID} is still {said} after 1 s\n"
    assert [one["id"] for one in json.loads(result.stdout)] == [JOB_ID]


def test_ctrl_c_leaves_the_job_running_and_says_so(wired: FakeServer) -> None:
    def interrupted(_: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    wired.on(f"GET /v1/jobs/{JOB_ID}", interrupted)
    said = wait(JOB_ID, code=130).stderr
    assert said == f"stopped waiting; what has not ended goes on. See it with: phalanx show {JOB_ID}\n"
    assert [request.method for request in wired.requests] == ["GET"]


def test_as_json_the_result_is_the_jobs(wired: FakeServer) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job("cancelled")))
    (found,) = json.loads(wait(JOB_ID, "-o", "json", code=1).stdout)
    assert found["state"] == "cancelled"


@pytest.mark.parametrize("timeout", ["90", "soon"])
def test_a_time_that_is_none_is_refused_with_an_example(wired: FakeServer, timeout: str) -> None:
    said = f"--timeout is {timeout!r}: expected a duration such as 90m or 1h30m"
    assert said in wait(JOB_ID, "--timeout", timeout, code=2).stderr
