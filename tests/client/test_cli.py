"""The command line against a fake server: what it prints, on which stream, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fake_server import AT, JOB_ID, FakeServer, answer, job, problem, stream
from phalanx import config
from phalanx.cli.app import app
from typer.testing import CliRunner, Result

Run = Callable[..., Result]


@pytest.fixture
def run(wired: FakeServer) -> Run:
    """Runs `phalanx …`; anything but a planned exit fails the test."""

    def call(*words: str, code: int = 0, **options: Any) -> Result:
        result = CliRunner().invoke(app, list(words), **options)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.output
        if code not in (0, 1, 130):
            assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), result.stderr
        return result

    return call


def sent(request: httpx.Request) -> Any:
    return json.loads(request.content)


def job_file(directory: Path, text: str) -> str:
    path = directory / "job.yaml"
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------ submit


def test_submit_prints_the_id_alone_on_stdout(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    wired.on("POST /v1/jobs", answer(job(), 201))
    result = run("submit", job_file(tmp_path, "name: lm\nrun: {command: x}\n"))
    assert result.stdout == f"{JOB_ID}\n"
    assert f"phalanx logs -f {JOB_ID}" in result.stderr


def test_submit_a_command_without_a_file(wired: FakeServer, run: Run) -> None:
    wired.on("POST /v1/jobs", answer(job(), 201))
    run("submit", "--no-upload", "--gpus", "2", "-e", "A=b=c", "--", "python", "my train.py", "--lr", "3e-4")
    assert sent(wired.requests[0]) == {
        "name": "my-train",
        "resources": {"gpus": 2},
        "run": {"command": "python 'my train.py' --lr 3e-4", "env": {"A": "b=c"}},
    }


SIZES = {
    "alone, gpus is the short form": (["--gpus", "4"], {"replicas": 2, "gpus_per_replica": 8}, {"gpus": 4}),
    "with replicas it is of each": (
        ["--replicas", "3", "--gpus", "4"],
        {"gpus": 1},
        {"replicas": 3, "gpus_per_replica": 4},
    ),
    "replicas of a short form have one GPU": (["--replicas", "3"], {"gpus": 2}, {"replicas": 3, "gpus_per_replica": 1}),
    "replicas alone keep their GPUs": (
        ["--replicas", "3"],
        {"gpus_per_replica": 8},
        {"replicas": 3, "gpus_per_replica": 8},
    ),
    "--set has the last word": (["--gpus", "4", "--set", "resources.gpus=5"], {}, {"gpus": 5}),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_from_options(wired: FakeServer, run: Run, tmp_path: Path, case: str) -> None:
    options, in_file, expected = SIZES[case]
    wired.on("POST /v1/jobs", answer(job(), 201))
    run("submit", job_file(tmp_path, json.dumps({"name": "lm", "resources": in_file})), *options)
    assert sent(wired.requests[0])["resources"] == expected


def test_options_change_the_file_and_the_directory_is_uploaded(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").touch()
    file = job_file(tmp_path, "name: lm\nrun: {command: x, workdir: code}\n")
    wired.on("POST /v1/jobs", answer(job(), 201))

    def here(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200)

    from phalanx.bundle import pack

    packed = pack(tmp_path / "code")
    packed.discard()
    wired.on(f"HEAD /v1/bundles/{packed.sha256}", here)
    run("submit", file, "--name", "other", "--tenant", "research/nlp", "--", "python", "train.py")
    head, post = wired.requests
    assert head.url.params["tenant"] == "research/nlp"
    assert sent(post) == {
        "name": "other",
        "tenant": "research/nlp",
        "run": {"command": "python train.py", "bundle": packed.sha256},
    }


def test_a_field_that_the_server_refuses_is_shown_with_its_place(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    wrong = {"field": "resources.gpu_per_replica", "message": "unknown field", "hint": "did you mean gpus_per_replica?"}
    wired.on("POST /v1/jobs", problem(422, "unknown_field", "", [wrong]))
    file = job_file(tmp_path, "name: lm\nresources:\n  gpu_per_replica: 1\n")
    result = run("submit", file, code=2)
    said = f"error: {file}:3:3: resources.gpu_per_replica: unknown field (did you mean gpus_per_replica?)\n"
    assert result.stderr == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit"], "nothing to submit: give a job file, or a command after --"),
        (["submit", "absent.yaml"], "absent.yaml: cannot read it: No such file"),
        (["submit", "--env", "A", "--", "true"], "--env is 'A': expected NAME=VALUE"),
        (["submit", "--set", "x", "--", "true"], "'x' is no setting"),
        (["submit", "--gpus", "many", "--", "true"], "Invalid value for '--gpus'"),
        (["jobs", "--label", "x"], "--label is 'x': expected KEY=VALUE"),
        (["jobs", "-o", "xml"], "Invalid value for '--output'"),
        (["jobz"], "No such command 'jobz'. Did you mean 'jobs'?; see `phalanx --help`"),
        (["nodes", "undrain", "n0"], "No such command 'undrain'. Did you mean 'uncordon'?; see `phalanx nodes --help`"),
        (["nodes", "cordn", "n0"], "No such command 'cordn'. Did you mean 'cordon'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["cancel"], "Missing argument 'JOB|ARRAY'; see `phalanx cancel --help`"),
        (["quota", "set", "a", "h100"], "nothing to change: give --nominal"),
        (["quota", "set", "a", "h100", "--lending-limit", "x"], "--lending-limit is 'x': expected a number of GPUs"),
    ],
)
def test_a_mistake_is_one_line(run: Run, words: list[str], said: str) -> None:
    assert said in run(*words, code=2).stderr


def test_dry_run_says_what_would_happen(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    hold = {"reason": "no_capacity", "message": "needs 16 free GPUs, 4 are"}
    wired.on("POST /v1/jobs", answer({"valid": True, "would": {"start": False, "hold": hold}, "warnings": ["w1"]}))
    result = run("submit", "--dry-run", job_file(tmp_path, "name: lm\n"))
    assert result.stdout == "valid; it would wait: needs 16 free GPUs, 4 are [no_capacity]\n"
    assert result.stderr == "warning: w1\n" and wired.requests[0].url.params["dry_run"] == "true"


def test_dry_run_of_what_can_never_start_does_not_say_that_it_waits(
    wired: FakeServer, run: Run, tmp_path: Path
) -> None:
    hold = {"reason": "impossible", "message": "can never start: needs 16 h100, but the nodes have 8"}
    wired.on("POST /v1/jobs", answer({"valid": True, "would": {"start": False, "hold": hold}, "warnings": []}))
    said = run("submit", "--dry-run", job_file(tmp_path, "name: lm\n")).stdout
    assert said == "valid, but it can never start: needs 16 h100, but the nodes have 8 [impossible]\n"


def test_dry_run_of_a_recipe_says_what_memory_each_rank_needs_and_where_that_is_there(
    wired: FakeServer, run: Run, tmp_path: Path
) -> None:
    parts = {"parameters": 30 << 30, "activations": 66 << 30, "logits": 0, "copies": 512 << 20}
    lacks = "does not fit on h100-80gb: needs 96.5 of 80 GiB; use parallel.shard = 4"
    suits = "fits on b200-192gb: 96.5 of 192 GiB"
    on = [
        {"gpu_type": "h100", "fits": False, "message": lacks},
        {"gpu_type": "b200", "fits": True, "message": suits},
    ]
    memory = {"total_bytes": sum(parts.values()), "parts_bytes": parts, "on": on}
    tried = {"valid": True, "would": {"start": True}, "warnings": [], "memory": memory}
    wired.on("POST /v1/jobs", answer(tried), answer({**tried, "memory": None}))
    file = job_file(tmp_path, "name: lm\n")
    assert run("submit", "--dry-run", file).stdout.splitlines() == [
        "valid; it would start now",
        "memory of each rank: 96.5 GiB (parameters 30, activations 66, copies 0.5)",
        f"  {lacks}",
        f"  {suits}",
    ]
    assert run("submit", "--dry-run", file).stdout == "valid; it would start now\n", "of a command nobody knows"


@pytest.mark.parametrize("words", [[], ["--follow"]])
def test_what_may_not_be_as_meant_is_said_at_submit(
    wired: FakeServer, run: Run, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.cli.submit._follow", lambda *_: 0)
    wired.on("POST /v1/jobs", answer({"id": JOB_ID, "name": "lm", "state": "queued", "warnings": ["w1"]}, 201))
    assert "warning: w1\n" in run("submit", *words, job_file(tmp_path, "name: lm\n")).stderr


# ------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (problem(422, "invalid_request", "no good"), 2, "no good"),
        (problem(401, "unauthorized", "A token is needed."), 3, "phalanx login"),
        (problem(403, "forbidden", "not yours"), 3, "not yours"),
        (problem(404, "not_found", "no such job"), 4, "no such job"),
        (problem(409, "conflict", "it has ended"), 5, "it has ended"),
        (problem(503, "unavailable", "the database is away"), 6, "the database is away"),
        (httpx.ConnectError("refused"), 6, "http://phalanx.test cannot be reached"),
    ],
)
def test_exit_codes(wired: FakeServer, run: Run, failure: Any, code: int, said: str) -> None:
    wired.on(f"POST /v1/jobs/{JOB_ID}/cancel", failure)
    assert said in run("cancel", JOB_ID, code=code).stderr


def test_a_broken_server_asks_for_the_request_id(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/whoami", problem(500, "internal", "Something went wrong"))
    result = run("whoami", code=1)
    assert result.stderr == (
        "error: Something went wrong; try again; if it stays, give the operator the request id req1\n"
    )


def test_the_exit_codes_are_documented(run: Run) -> None:
    text = " ".join(run("--help").stdout.split())
    assert "0 done · 1 the job or the operation failed · 2 usage or invalid input" in text


# ------------------------------------------------------------------ which job


def test_a_job_by_the_beginning_of_its_id(wired: FakeServer, run: Run) -> None:
    other = job(id="job_" + "9" * 32)
    wired.on("GET /v1/jobs", answer({"items": [job(), other], "next_cursor": None}))
    wired.on(f"POST /v1/jobs/{JOB_ID}/hold", answer(job(held=True)))
    assert "is held" in run("hold", JOB_ID[:9]).stdout


def test_a_job_by_its_name_when_there_is_one(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [job()], "next_cursor": None}))
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job()))
    assert json.loads(run("show", "lm", "-o", "json").stdout)["id"] == JOB_ID
    assert wired.requests[0].url.params["name"] == "lm"


def test_a_name_of_several_jobs_is_refused(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [job(), job(id="job_" + "9" * 32)], "next_cursor": None}))
    assert f"'lm' means several jobs: {JOB_ID}, job_9" in run("cancel", "lm", code=2).stderr


def test_a_job_that_is_not_there(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [], "next_cursor": None}))
    assert "there is no job 'lm' that you can see" in run("show", "lm", code=4).stderr


def test_last_is_the_job_submitted_from_here(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    run("show", "@last", code=4)
    wired.on("POST /v1/jobs", answer(job(), 201)).on(f"GET /v1/jobs/{JOB_ID}", answer(job()))
    run("submit", job_file(tmp_path, "name: lm\n"))
    assert JOB_ID in run("show", "@last").stdout


# ------------------------------------------------------------------ looking


RUNNING = job(
    "running",
    attempts=1,
    progress={"step": 42, "total_steps": 100, "values": {"loss": 2.5, "tokens_per_s": 12345.6}, "at": AT},
    attempt={
        "id": "att_1",
        "number": 1,
        "state": "running",
        "placements": [
            {"node": "node-0", "gpu_indices": [0, 1], "first_rank": 0, "ranks": 2},
            {"node": "node-1", "gpu_indices": [2], "first_rank": 2, "ranks": 1},
        ],
        "ranks": [
            {"rank": 0, "warm": True},
            {"rank": 1, "warm": True},
            {"rank": 2, "warm": False, "cold_reason": "sets PYTHONHASHSEED"},
        ],
    },
    phases={"accepted_s": 0.004, "queued_s": 0.006, "placed_s": 0.09, "total_s": 0.1},
)


def test_show_tells_a_job_in_words(wired: FakeServer, run: Run) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(RUNNING))
    text = run("show", JOB_ID).stdout
    for said in (
        "2 replicas × 2 GPUs",
        "step 42/100  loss 2.5  12,346 tokens/s",
        "node-0  ranks 0,1  GPUs 0,1",
        "node-1  rank 2  GPU 2",
        "2 warm; rank 2 cold: sets PYTHONHASHSEED",
        "0.100 s after submit = accepted 0.004 s + queued 0.006 s + placed 0.090 s",
    ):
        assert said in text, text


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"stop_cause": "preemption", "stop_for": "job_2", "stop_reason": "reclaim"}, "gives way to job_2 (reclaim)"),
        ({"stop_cause": "preemption"}, "gives way  "),
        ({"stop_cause": "resize", "next": {"placement": [{"node": "n1", "replicas": 3}]}}, "with 3 replicas on n1"),
        ({"stop_cause": "migration", "stop_for": "job_2"}, "is moved for job_2"),
    ],
)
def test_show_tells_why_a_job_stops_and_where_it_goes_on(
    wired: FakeServer, run: Run, stop: dict[str, Any], said: str
) -> None:
    attempt = RUNNING["attempt"] | {"state": "stopping"} | stop
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(RUNNING | {"state": "stopping", "attempt": attempt}))
    assert said in run("show", JOB_ID).stdout


def test_an_elastic_job_shows_the_gpus_that_it_has(wired: FakeServer, run: Run) -> None:
    """It asked for two replicas of two GPUs, and runs with three."""
    grown = RUNNING | {"attempt": RUNNING["attempt"] | {"replicas": 3}}
    wired.on("GET /v1/jobs", answer({"items": [grown], "next_cursor": None}))
    assert run("jobs").stdout.splitlines()[1].split()[4] == "6"


def test_lists_as_table_json_and_yaml(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [RUNNING | {"new_field": 1}], "next_cursor": None}))
    table = run("jobs", "--state", "running").stdout.splitlines()
    assert table[0].split()[:5] == ["ID", "NAME", "TENANT", "STATE", "GPUS"]
    assert table[1].split()[:6] == [JOB_ID, "lm", "default", "running", "4", "42/100"]
    assert json.loads(run("jobs", "-o", "json").stdout)[0]["new_field"] == 1
    assert yaml.safe_load(run("jobs", "-o", "yaml").stdout)[0]["id"] == JOB_ID


def test_an_empty_list_says_so_beside_stdout(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [], "next_cursor": None}))
    result = run("jobs")
    assert result.stdout == "" and result.stderr.strip() == "no jobs"


def test_only_as_many_as_asked_for(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [job(), job(), job()], "next_cursor": "more"}))
    assert len(json.loads(run("jobs", "-n", "2", "-o", "json").stdout)) == 2
    assert wired.requests[0].url.params["limit"] == "2"


def test_queue_and_nodes_and_tenants(wired: FakeServer, run: Run) -> None:
    hold = {"reason": "quota", "message": "research is at its quota of 8 h100"}
    item = {"position": 3, "job_id": JOB_ID, "name": "lm", "replicas": 2, "gpus_per_replica": 8, "hold": hold}
    node = {"id": "node_1", "name": "node-0", "state": "ready", "gpus": 8, "gpus_used": 2, "memory_bytes": 1 << 30}
    tenant = {"path": "research", "quotas": {"h100": {"nominal": 8}}, "usage": {"h100": 8}}
    wired.on("GET /v1/queue", answer({"items": [item]})).on("GET /v1/nodes", answer({"items": [node]}))
    wired.on("GET /v1/tenants", answer({"items": [tenant]}))
    assert "16" in (line := run("queue").stdout.splitlines()[1]) and "at its quota of 8 h100" in line
    assert "2/8" in run("nodes").stdout and "2/8" in run("nodes", "list").stdout
    assert "h100 8/8" in run("tenants").stdout


def test_a_drain_says_what_will_not_leave(wired: FakeServer, run: Run) -> None:
    remaining = [
        {"job": JOB_ID, "why": "not_preemptible", "ends_by": "2026-11-21T13:00:00Z"},
        {"job": JOB_ID, "why": "no_room", "ends_by": None},
    ]
    node = {"id": "node_1", "name": "node-0", "state": "draining", "gpus": 8, "gpus_used": 2}
    node |= {"remaining": remaining, "outlook": "1 job stays. It may not empty by itself."}
    wired.on("POST /v1/nodes/node-0/drain", answer(node)).on("GET /v1/nodes/node-0", answer(node))
    for command in ("drain", "show"):
        said = run("nodes", command, "node-0").stdout
        assert "It may not empty by itself." in said
        assert f"{JOB_ID}  not preemptible, 2026-11-21 13:00:00Z at the latest" in said
        assert f"{JOB_ID}  no room, no time limit" in said


def test_a_node_says_whose_users_run_its_ranks(wired: FakeServer, run: Run) -> None:
    node = {"id": "node_1", "name": "node-0", "state": "ready", "gpus": 8}
    wired.on("GET /v1/nodes/node-0", answer(node | {"own_users": True}))
    assert "one for each tenant" in run("nodes", "show", "node-0").stdout
    wired.on("GET /v1/nodes/node-0", answer(node | {"own_users": False}))
    assert "the runner's own, for every tenant" in run("nodes", "show", "node-0").stdout


def test_show_tells_of_a_waiting_job_how_its_last_attempt_ended_too(wired: FakeServer, run: Run) -> None:
    hold = {"reason": "backoff", "message": "pauses until 12:00", "unblocks": []}
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job(hold=hold, message="could not start: no mount")))
    text = run("show", JOB_ID).stdout
    assert "pauses until 12:00 [backoff]" in text and "could not start: no mount" in text


@pytest.mark.parametrize(
    ("parts", "share", "measured", "said"),
    [
        ({"start": 900.0, "productive": 2700.0}, 0.75, True, "goodput 75.0% of 1.00 GPU-hours in 2 attempts\n"),
        ({"start": 900.0, "productive": 2700.0}, 0.75, False, "(at most: the job does not say itself"),
        ({"start": 1.0, "rendezvous": 3599.0}, 0.0, True, "(no step was seen: it reported none, and no torch optim"),
        ({}, None, True, "it was given no GPU time yet\n"),
    ],
)
def test_goodput_says_what_it_is_of(
    wired: FakeServer, run: Run, parts: dict[str, float], share: float | None, measured: bool, said: str
) -> None:
    found = {"job_id": JOB_ID, "attempts": 2, "goodput": share, "allocated_gpu_s": 3600.0, "parts_gpu_s": parts}
    wired.on(f"GET /v1/jobs/{JOB_ID}/goodput", answer(found | {"measured": measured}))
    assert said in run("goodput", JOB_ID).stdout


def test_explain_is_the_server_s_sentence(wired: FakeServer, run: Run) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}/explain", answer({"job_id": JOB_ID, "text": "It waits for 4 more GPUs."}))
    assert run("explain", JOB_ID).stdout == "It waits for 4 more GPUs.\n"


def test_logs_reads_all_of_a_long_output(wired: FakeServer, run: Run) -> None:
    def piece(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params["start_bytes"])
        headers = {"x-log-size-bytes": str((16 << 20) + 5), "content-type": "text/plain"}
        return httpx.Response(200, text="first\n" if start == 0 else "second\n", headers=headers)

    wired.on(f"GET /v1/jobs/{JOB_ID}/logs", piece)
    assert run("logs", JOB_ID).stdout == "first\nsecond\n"


def test_following_logs_of_several_ranks_prints_whole_lines_with_their_rank(wired: FakeServer, run: Run) -> None:
    def log(id: int, rank: int, text: str) -> tuple[str, str, dict]:
        return ("log", str(id), {"attempt": 1, "rank": rank, "stream": "stdout", "at": AT, "text": text})

    pieces = [log(1, 0, "a"), log(2, 1, "b\n"), log(3, 0, "c\nd"), ("end", "", {"state": "succeeded"})]
    wired.on(f"GET /v1/jobs/{JOB_ID}/logs", stream(*pieces)).on(f"GET /v1/jobs/{JOB_ID}", answer(job()))
    assert run("logs", "-f", JOB_ID).stdout == "[1] b\n[0] ac\n[0] d\n"


def test_following_logs_of_one_attempt(wired: FakeServer, run: Run) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}/logs", stream(("end", "", {}))).on(f"GET /v1/jobs/{JOB_ID}", answer(job()))
    run("logs", "-f", "--attempt", "2", JOB_ID)
    assert wired.seen(f"GET /v1/jobs/{JOB_ID}/logs")[0].url.params["attempt"] == "2"


@pytest.mark.parametrize("command", ["logs", "metrics", "events"])
def test_following_as_yaml_prints_documents(wired: FakeServer, run: Run, command: str) -> None:
    own = {"logs": {"attempt": 1, "rank": 0, "stream": "stdout"}, "metrics": {"values": {}}}.get(command, {"kind": "x"})
    records = [{"id": n, "at": AT, "text": f"a: {n}\n---\n", "message": "", **own} for n in range(2)]
    sent = [("any", str(n), one) for n, one in enumerate(records)]
    wired.on(f"GET /v1/jobs/{JOB_ID}/{command}", stream(*sent, ("end", "", {})))
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job()))
    assert list(yaml.safe_load_all(run(command, "-f", "-o", "yaml", JOB_ID).stdout)) == records


def test_following_has_no_window(run: Run) -> None:
    said = "--from and --to say what to show of the past: leave out --follow"
    assert said in run("metrics", "-f", "--from", "2026-11-21", JOB_ID, code=2).stderr
    assert said in run("metrics", "-f", "--to", "2026-11-21", JOB_ID, code=2).stderr


def test_metrics_as_sparklines_and_as_a_chart(wired: FakeServer, run: Run) -> None:
    points = [{"at": AT, "step": i, "min": 9.0 - i, "max": 9.0 - i, "mean": 9.0 - i, "count": 2} for i in range(9)]
    wired.on(f"GET /v1/jobs/{JOB_ID}/metrics", answer({"series": [{"name": "loss", "points": points}]}))
    line = run("metrics", JOB_ID).stdout.splitlines()[1].split()
    assert line[:6] == ["loss", "9", "1", "1", "9", "18"] and line[6][0] == "█" and line[6][-1] == "▁"
    chart = run("metrics", JOB_ID, "--name", "loss").stdout.splitlines()
    assert chart[0] == "loss: 9 → 1 in 0 s, step 0–8" and chart[1].startswith("9 │█") and chart[-1].startswith("1 │")


def test_following_metrics_as_json_lines(wired: FakeServer, run: Run) -> None:
    report = {"at": AT, "step": 3, "total_steps": 9, "values": {"loss": 1.25}}
    end = ("end", "", {"state": "succeeded"})
    wired.on(f"GET /v1/jobs/{JOB_ID}/metrics", stream(("metrics", "1", report), end))
    assert json.loads(run("metrics", "-f", "-o", "json", JOB_ID).stdout) == report


def test_events(wired: FakeServer, run: Run) -> None:
    event = {"id": 1, "kind": "job.started", "at": AT, "message": "all ranks run", "data": {}, "node": None}
    wired.on(f"GET /v1/jobs/{JOB_ID}/events", answer({"items": [event], "next_cursor": None}))
    assert "all ranks run" in run("events", JOB_ID).stdout


# ------------------------------------------------------------------ acting


def test_quota_set_shows_the_new_quota(wired: FakeServer, run: Run) -> None:
    quotas = {"h100": {"nominal": 16, "borrowing_limit": None, "lending_limit": 0}}
    wired.on("GET /v1/quotas/research/nlp", answer({"quotas": {}}, etag='"1"'))
    wired.on("PUT /v1/quotas/research/nlp", answer({"quotas": quotas}))
    wired.on("GET /v1/tenants/research/nlp", answer({"path": "research/nlp", "quotas": quotas, "usage": {"h100": 4}}))
    words = ["--nominal", "16", "--borrowing-limit", "none", "--lending-limit", "0"]
    shown = run("quota", "set", "research/nlp", "h100", *words).stdout.splitlines()[1]
    assert shown.split() == ["h100", "4", "16", "no", "limit", "0"]
    assert sent(wired.seen("PUT /v1/quotas/research/nlp")[0]) == {"quotas": quotas}


def test_login_checks_the_token_and_keeps_it_to_itself(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    wired.on("GET /v1/whoami", answer({"name": "first-admin", "role": "admin"}))
    token = tmp_path / "admin-token"
    token.write_text("phx_secret\n")
    result = run("login", "--url", "http://phalanx.test/", "--token-file", str(token))
    assert result.stdout.startswith("signed in to http://phalanx.test as first-admin (admin)")
    assert config.config_path().stat().st_mode & 0o777 == 0o600
    assert config.load() == config.Login("http://phalanx.test", "phx_secret")


def test_login_over_plain_http_to_another_machine_warns(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/whoami", answer({"role": "admin"}))
    assert "is not encrypted" in run("login", "http://phalanx.test", "--token", "t").stderr
    assert run("login", "http://127.0.0.1:8321", "--token", "t").stderr == ""


def test_without_a_server_it_says_how_to_get_one() -> None:
    result = CliRunner().invoke(app, ["jobs"])
    assert result.exit_code == 2
    said = "error: no server is configured: run `phalanx login URL`, or set PHALANX_URL and PHALANX_TOKEN\n"
    assert result.stderr == said


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PHALANX_URL": "http://h:abc"}, "'http://h:abc' is no server address"),
        ({"PHALANX_URL": "http://[::1"}, "'http://[::1' is no server address"),
        ({"PHALANX_URL": "http://h\x7f"}, "is no server address"),
        ({"PHALANX_URL": "http://h", "PHALANX_TOKEN": "phx_é"}, "the token has characters that no token has"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(variables: dict[str, str], said: str) -> None:
    result = CliRunner().invoke(app, ["jobs"], env=variables)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr


def test_login_says_where_it_cannot_store(wired: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(config, "write_private", refuse)
    wired.on("GET /v1/whoami", answer({"role": "admin", "user": "ada"}))
    assert "config.json cannot be written" in run("login", "http://phalanx.test", "--token", "phx_x", code=2).stderr
    assert (
        "cannot read the token from ~nosuch/x" in run("login", "http://a", "--token-file", "~nosuch/x", code=2).stderr
    )


def test_login_stores_nothing_that_the_server_refuses(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/whoami", problem(401, "unauthorized", "This token is not known."))
    run("login", "http://phalanx.test", "--token", "phx_wrong", code=3)
    assert config.load() is None
    assert "is no server address" in run("login", "phalanx.test", "--token", "x", code=2).stderr


def test_a_token_is_printed_alone(wired: FakeServer, run: Run) -> None:
    wired.on("POST /v1/tokens", answer({"id": "tok_1", "role": "member", "token": "phx_new"}, 201))
    assert run("tokens", "create", "ci", "--tenant", "research").stdout == "phx_new\n"


# ------------------------------------------------------------------ the program


def test_version_imports_little() -> None:
    """That is what makes it quick; the budget is 0.25 s."""
    code = "import sys; from phalanx.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version.startswith("phalanx 0.")
    assert not {"httpx", "phalanx_server", "phalanx_worker", "ray", "torch"} & set(modules.split())


def test_no_colour_and_no_escapes_into_a_pipe(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/jobs", answer({"items": [RUNNING], "next_cursor": None}))
    assert "\x1b" not in run("jobs").output


def test_without_a_command_it_helps(run: Run) -> None:
    assert "Usage: phalanx" in " ".join(run().stdout.split())
