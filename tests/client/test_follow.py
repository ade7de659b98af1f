"""Following a job to its end: the display, the summary, outages, Ctrl-C, exit codes."""

from __future__ import annotations

import io
import json
import signal
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import AT, JOB_ID, FakeServer, answer, job, problem, stream
from phalanx.cli import describe
from phalanx.cli.app import app
from phalanx.cli.board import LiveBoard, Pace, PlainBoard
from phalanx.cli.follow import follow
from phalanx.client import AsyncClient
from phalanx.models import Job, Progress
from rich.console import Console
from typer.testing import CliRunner, Result

LATER = "2026-11-21T02:03:46.000000Z"
HOLD = {"reason": "no_capacity", "message": "needs 4 free GPUs, 1 is", "unblocks": ["lm-2 ends"]}
ATTEMPT = {
    "id": "att_1",
    "number": 1,
    "state": "ended",
    "placements": [
        {"node": "node-0", "gpu_indices": [0, 1], "first_rank": 0, "ranks": 2},
        {"node": "node-1", "gpu_indices": [0, 1], "first_rank": 2, "ranks": 2},
    ],
    "ranks": [{"rank": rank, "warm": True} for rank in range(4)],
}
PHASES = {
    "accepted_s": 0.004,
    "queued_s": 0.006,
    "placed_s": 0.010,
    "ranks_started_s": 0.060,
    "rendezvous_s": 0.050,
    "first_step_s": 0.101,
    "total_s": 0.231,
}


def running(step: int) -> dict[str, Any]:
    values = {"loss": 2.5, "tokens_per_s": 12345.6}
    return job("running", progress={"step": step, "total_steps": 100, "values": values, "at": AT})


def ended(state: str, **fields: Any) -> dict[str, Any]:
    common = {"attempts": 1, "finished_at": LATER, "phases": PHASES, "attempt": ATTEMPT}
    return running(100) | {"state": state, **common, **fields}


def loss(*means: float) -> dict[str, Any]:
    return {
        "series": [{"name": "loss", "points": [{"at": AT, "mean": mean, "step": i} for i, mean in enumerate(means)]}]
    }


@pytest.fixture
def following(wired: FakeServer, tmp_path: Path):
    """`phalanx submit --follow` of a job that goes through the given states."""

    def call(
        *states: dict[str, Any] | httpx.Response | BaseException, code: int, words: tuple[str, ...] = ()
    ) -> Result:
        (tmp_path / "job.yaml").write_text("name: lm\n")
        answers = [state if isinstance(state, httpx.Response | BaseException) else answer(state) for state in states]
        wired.on("POST /v1/jobs", answer(job(hold=HOLD), 201)).on(f"GET /v1/jobs/{JOB_ID}", *answers)
        wired.routes.setdefault(f"GET /v1/jobs/{JOB_ID}/events", [stream(("end", "", {"state": "x"}))])
        wired.routes.setdefault(f"GET /v1/jobs/{JOB_ID}/metrics", [answer(loss(5.5, 3.0, 2.01))])
        result = CliRunner().invoke(app, ["submit", str(tmp_path / "job.yaml"), "--follow", *words])
        assert result.exit_code == code, result.output
        return result

    return call


def test_the_summary_tells_how_it_went(following) -> None:
    checkpoint = {"url": "s3://bucket/lm/100", "step": 100}
    result = following(running(1), ended("succeeded", checkpoint=checkpoint), code=0)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"✔ lm succeeded in 42 s {JOB_ID}"
    for said in (
        "accepted 4.0 ms █",
        "rendezvous 50.0 ms ███████",
        "total 231.0 ms",
        "loss 5.5 → 2.01 █▃▁",
        "steps 100/100 12,346 tokens/s",
        "ran on node-0 ranks 0,1 GPUs 0,1",
        "node-1 ranks 2,3 GPUs 0,1",
        "ranks warm: forked with torch imported",
        "checkpoint s3://bucket/lm/100 (step 100)",
        f"phalanx logs {JOB_ID}",
        f"phalanx metrics {JOB_ID}",
        f"phalanx events {JOB_ID}",
        f"phalanx show {JOB_ID}",
    ):
        assert said in lines, result.stdout


def test_the_phases_that_are_shown_add_up(following) -> None:
    result = following(ended("succeeded"), code=0)
    shown = [line.split() for line in result.stdout.splitlines() if " ms" in line]
    milliseconds = {" ".join(words[: words.index("ms") - 1]): float(words[words.index("ms") - 1]) for words in shown}
    total = milliseconds.pop("total")
    assert len(milliseconds) == 6 and sum(milliseconds.values()) == pytest.approx(total)


def test_phases_count_from_what_came_before_the_attempt(following) -> None:
    assert "submit → first step" in following(ended("succeeded"), code=0).stdout
    later = following(ended("succeeded", attempts=2, phases={**PHASES, "accepted_s": None}), code=0).stdout
    assert "return to the queue → first step" in later and "submit →" not in later


def test_away_from_a_terminal_there_is_a_line_for_each_state(following) -> None:
    result = following(job(hold=HOLD), running(1), running(2), ended("succeeded"), code=0)
    assert result.stderr.splitlines() == [
        f"lm {JOB_ID}: queued: needs 4 free GPUs, 1 is [no_capacity]",
        f"lm {JOB_ID}: running",
        f"lm {JOB_ID}: succeeded",
    ]


BACKOFF = {"reason": "backoff", "message": "pauses until 12:00", "unblocks": []}
NO_START = "could not start: mount /etc: the operator allows nothing to be mounted (--allow-mount)"


def test_a_job_that_is_tried_again_says_meanwhile_what_went_wrong(following) -> None:
    result = following(job(hold=BACKOFF, message=NO_START), running(1), ended("succeeded"), code=0)
    assert f"queued: pauses until 12:00 [backoff]; its last attempt: {NO_START}" in result.stderr
    board = LiveBoard()
    board.show(Job.from_json(job(hold=BACKOFF, message=NO_START)))
    assert f"its last attempt: {NO_START}" in rendered(board)
    assert describe.last_end(Job.from_json(job("failed", message=NO_START))) is None, "it waits no more"


def test_how_fast_an_elastic_job_is_with_each_number_of_replicas() -> None:
    measured = {"unit": "tokens_per_s", "gpu_type": "h100"}
    speeds = [
        measured | {"replicas": 1, "per_s": 1000.0, "relative": 1.0},
        measured | {"replicas": 2, "per_s": 1912.5, "relative": 1.9125},
    ]
    assert describe.speeds(Job.from_json(job("running", speeds=speeds))) == [
        "1 replica: 1,000 tokens/s",
        "2 replicas: 1,912 tokens/s, 1.91 × one",
    ]
    earlier = [{"replicas": n, "gpu_type": kind, "relative": n * 0.9} for n, kind in ((2, "a100"), (4, "h100"))]
    assert describe.speeds(Job.from_json(job("running", speeds=earlier))) == [
        "2 replicas of a100: 1.80 × one (an earlier job of this name)",
        "4 replicas of h100: 3.60 × one (an earlier job of this name)",
    ]


def test_a_job_that_failed_shows_the_stderr_of_the_rank_that_failed(following) -> None:
    exits = [
        {"rank": 0, "signal": signal.SIGTERM, "ended_at": 20.0},
        {"rank": 1, "exit_code": 3, "ended_at": 10.0, "tail": "Traceback\nValueError: [red]bad[/]\n"},
    ]
    fields = {"reason": "failed", "message": "rank 1 exited with 3", "attempt": {**ATTEMPT, "exits": exits}}
    result = following(ended("failed", **fields), code=1)
    assert "rank 1 exited with 3\n  Traceback\n  ValueError: [red]bad[/]\n" in result.stderr
    assert "✘ lm failed" in result.stdout and "rank 1 exited with 3" in result.stdout


def test_without_a_tail_the_logs_are_asked(following, wired: FakeServer) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}/logs", httpx.Response(200, text="boom\n"))
    result = following(ended("failed", attempt={**ATTEMPT, "exits": [{"rank": 2, "exit_code": 1}]}), code=1)
    assert "rank 2 exited with 1\n  boom\n" in result.stderr
    asked = wired.seen(f"GET /v1/jobs/{JOB_ID}/logs")[0].url.params
    assert (asked["rank"], asked["stream"]) == ("2", "stderr")


def test_a_cancelled_job_is_no_success(following) -> None:
    result = following(ended("cancelled", attempt=None, phases=None, progress=None), code=1)
    assert "■ lm cancelled" in result.stdout and "✔" not in result.stdout


def test_a_summary_needs_no_metrics(following, wired: FakeServer) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}/metrics", problem(500, "internal"))
    assert "✔ lm succeeded" in following(ended("succeeded"), code=0).stdout


def test_as_json_the_result_is_the_job(following) -> None:
    result = following(running(1), ended("succeeded"), code=0, words=("-o", "json"))
    assert json.loads(result.stdout)["state"] == "succeeded"


def test_ctrl_c_leaves_the_job_running(following) -> None:
    result = following(running(1), KeyboardInterrupt(), code=130)
    assert f"stopped following; lm goes on. See it with: phalanx show {JOB_ID}" in result.stderr


def test_a_server_that_restarts_is_waited_for(following, wired: FakeServer) -> None:
    away = [httpx.ConnectError("refused")] * 7  # one more than a request is tried
    result = following(running(1), *away, ended("succeeded"), code=0)
    assert "cannot be reached (refused); the job goes on, trying again" in result.stderr


async def test_an_event_wakes_the_follower(server: FakeServer, async_client: AsyncClient) -> None:
    """With a poll interval of minutes the end is still seen at once."""
    event = ("event", "1", {"id": 1, "kind": "job.ended", "at": AT, "message": "", "data": {}})
    server.on(f"GET /v1/jobs/{JOB_ID}", answer(running(1)), answer(ended("succeeded")))
    server.on(f"GET /v1/jobs/{JOB_ID}/events", stream(event, ("end", "", {})))
    job = await follow(async_client, JOB_ID, PlainBoard(lambda _: None), poll_s=600.0)
    assert job.state == "succeeded"


# ------------------------------------------------------------------ boards


def test_plain_progress_is_sparse() -> None:
    now, lines = [0.0], []
    board = PlainBoard(lines.append, clock=lambda: now[0])
    for tenth in range(50):
        now[0] = tenth / 10
        board.show(Job.from_json(running(tenth)))
    assert lines[0].endswith(": running")
    assert [line.split()[2] for line in lines[1:]] == ["20/100", "40/100"]


def progress(step: int, at_s: float, total: int | None = 100) -> Progress:
    at = datetime.fromisoformat(AT) + timedelta(seconds=at_s)
    return Progress(step=step, total_steps=total, values={}, at=at)


def test_the_time_left_is_by_the_pace_of_the_last_minute() -> None:
    pace = Pace()
    assert pace.left_s(progress(0, 0)) is None
    for step, at_s in ((0, 0.0), (10, 100.0), (20, 110.0), (30, 120.0)):
        pace.take(progress(step, at_s))
    assert pace.left_s(progress(30, 120.0)) == pytest.approx(70.0)
    assert pace.left_s(progress(30, 120.0, total=None)) is None


def test_a_new_attempt_starts_a_new_pace() -> None:
    pace = Pace()
    for step, at_s in ((50, 0.0), (60, 1.0), (55, 10.0), (56, 12.0)):
        pace.take(progress(step, at_s))
    assert pace.left_s(progress(56, 12.0)) == pytest.approx(88.0)


def rendered(board: LiveBoard) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(board.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_live_board_shows_what_a_queued_job_waits_for() -> None:
    board = LiveBoard()
    rendered(board)
    board.show(Job.from_json(job(hold=HOLD, position=3)))
    text = rendered(board)
    assert "position 3: needs 4 free GPUs, 1 is [no_capacity]" in text and "would unblock it: lm-2 ends" in text


def test_the_live_board_shows_how_far_a_running_job_is() -> None:
    board = LiveBoard(clock=lambda: datetime.fromisoformat(LATER).timestamp())
    board.show(Job.from_json(job("running")))
    assert "waiting for its first report" in rendered(board)
    for step, at_s in ((10, 0.0), (20, 10.0)):
        at = (datetime.fromisoformat(AT) + timedelta(seconds=at_s)).isoformat()
        board.show(Job.from_json(running(step) | {"progress": running(step)["progress"] | {"at": at}}))
    text = rendered(board)
    for said in ("running", "0:42", "step 20/100", "━", "loss 2.5", "12,346 tokens/s", "ETA 1:20"):
        assert said in text, text
    board.note("the server is away")
    assert "the server is away" in rendered(board)
