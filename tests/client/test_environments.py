"""Environments from this side: requirements files become lines, and the commands and requests about registered ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import AT, JOB_ID, FakeServer, answer, job, problem, stream
from phalanx.cli.app import app
from phalanx.cli.board import LiveBoard, PlainBoard
from phalanx.cli.follow import follow
from phalanx.client import AsyncClient, Client
from phalanx.errors import JobFileError
from phalanx.models import Job
from phalanx.requirements import filled_in, read
from rich.console import Console
from typer.testing import CliRunner, Result

ID = "env_" + "0" * 32
ENVIRONMENT = {
    "id": ID,
    "name": "nlp",
    "tenant": "research",
    "requirements": ["einops==0.8.1", "tiktoken"],
    "created_by": "ada",
    "created_at": AT,
}
JOB_FILE = {"name": "lm", "resources": {"gpus": 1}, "run": {"command": "x"}}
FIELD = "run.environment.requirements"


def written(directory: Path, **files: str) -> Path:
    """Files by name without `.txt`, `_` for a directory; the first one's path."""
    paths = [directory / f"{name.replace('_', '/')}.txt" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return paths[0]


def sent(server: FakeServer, route: str) -> Any:
    return json.loads(server.seen(route)[-1].content)


# ------------------------------------------------------------------ requirements files


def test_lines_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "einops==0.8.1  # shapes\n\n--index-url https://packages.example/simple\n"
    assert read(written(tmp_path, a=text)) == text.splitlines()


def test_a_line_goes_on_after_a_backslash(tmp_path: Path) -> None:
    assert read(written(tmp_path, a="one \\\n  >=1\n# not \\\ntwo\\\n# end\nthree \\")) == [
        "one   >=1",
        "# not \\",
        "two # end",
        "three ",
    ]


@pytest.mark.parametrize(
    "option", ["-r b.txt", "-rb.txt", "--requirement b.txt", "--requirement=b.txt  # why", "-r 'b.txt'"]
)
def test_an_included_file_stands_in_its_place(tmp_path: Path, option: str) -> None:
    assert read(written(tmp_path, a=f"one\n{option}\nthree", b="two")) == ["one", "two", "three"]


def test_included_files_count_from_the_file_that_names_them_and_may_come_twice(tmp_path: Path) -> None:
    path = written(tmp_path, a="-r sub/b.txt\n-r sub/c.txt", sub_b="-r c.txt\nb", sub_c="c")
    assert read(path) == ["c", "b", "c"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "x\n-r a.txt"}, "a.txt:2: run.environment.requirements: {dir}/a.txt includes itself"),
        ({"a": "-r b.txt", "b": "\n-r a.txt"}, "b.txt:2: run.environment.requirements: {dir}/a.txt includes itself"),
        ({"a": "x\n\n-c pins.txt"}, "a.txt:3: run.environment.requirements: -c is not taken here: pin the versions"),
        ({"a": "--constraint=p.txt"}, "a.txt:1: run.environment.requirements: --constraint is not taken here"),
        ({"a": "-r"}, "a.txt:1: run.environment.requirements: -r takes one file on this machine"),
        ({"a": "-r https://x.example/r.txt"}, "a.txt:1: run.environment.requirements: -r takes one file"),
        ({"a": "-r 'b"}, "a.txt:1: run.environment.requirements: -r takes one file"),
        ({"a": "-r no.txt"}, "a.txt:1: run.environment.requirements: cannot read {dir}/no.txt: No such file"),
        ({"a": "-r \0"}, "a.txt:1: run.environment.requirements: cannot read"),
        ({"a": "-r ."}, "a.txt:1: run.environment.requirements: cannot read {dir}: Is a directory"),
        ({"a": "-r b.txt\n" * 100, "b": ""}, "a.txt:100: run.environment.requirements: includes more than 100 files"),
        ({"a": "x\n" * 10_001}, "a.txt:10001: run.environment.requirements: more than 10000 lines"),
        ({"a": "x" * (1 << 20) + "y"}, "a.txt has more than 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_line_and_field(tmp_path: Path, files: dict[str, str], said: str) -> None:
    with pytest.raises(JobFileError) as raised:
        read(written(tmp_path, **files))
    assert said.format(dir=tmp_path) in str(raised.value)


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(JobFileError, match=r"a.txt:2: .*is not UTF-8") as raised:
        read(tmp_path / "a.txt")
    assert (raised.value.path, raised.value.line) == (str(tmp_path / "a.txt"), 2)


@pytest.mark.parametrize(
    "run", [None, "x", {}, {"environment": None}, {"environment": "x"}, {"environment": {"requirements": ["a"]}}]
)
def test_a_job_file_without_a_file_to_read_stays_as_it_is(run: Any) -> None:
    assert filled_in({"name": "lm", "run": run}) == {"name": "lm", "run": run}


# ------------------------------------------------------------------ in the SDK


def with_requirements(given: Any) -> dict[str, Any]:
    return {**JOB_FILE, "run": {"command": "x", "environment": {"requirements": given}}}


def test_the_sdk_reads_the_file(server: FakeServer, client: Client, tmp_path: Path) -> None:
    path = written(tmp_path, a="one\n-r b.txt", b="two")
    server.on("POST /v1/jobs", answer(job(), 201)).on("POST /v1/jobs/batch", answer({"items": [job()]}, 201))
    client.submit(with_requirements(str(path)))
    expected = with_requirements(["one", "two"])
    assert sent(server, "POST /v1/jobs") == expected
    client.submit_many([with_requirements(path)])
    assert sent(server, "POST /v1/jobs/batch") == {"jobs": [expected]}
    server.on("POST /v1/jobs", answer({"valid": True}))
    client.dry_run(with_requirements(str(path)))
    assert sent(server, "POST /v1/jobs") == expected
    with pytest.raises(JobFileError, match=rf"{FIELD}: cannot read nowhere.txt: No such file"):
        client.submit(with_requirements("nowhere.txt"))


def test_the_sdk_speaks_of_registered_environments(server: FakeServer, client: Client, tmp_path: Path) -> None:
    server.on("GET /v1/environments", answer({"items": [ENVIRONMENT], "next_cursor": None}))
    server.on(f"GET /v1/environments/{ID}", answer(ENVIRONMENT))
    server.on("POST /v1/environments", answer(ENVIRONMENT, 201))
    (found,) = client.environments(name="nlp")
    assert (found.name, found.tenant, found.requirements) == ("nlp", "research", ["einops==0.8.1", "tiktoken"])
    assert client.environment(ID) == found == client.create_environment("nlp", ["einops"], tenant="research")
    assert sent(server, "POST /v1/environments") == {"name": "nlp", "requirements": ["einops"], "tenant": "research"}
    client.create_environment("nlp", written(tmp_path, a="one"), idempotency_key="k")
    assert sent(server, "POST /v1/environments") == {"name": "nlp", "requirements": ["one"]}
    assert server.requests[-1].headers["idempotency-key"] == "k"


async def test_the_async_client_too(server: FakeServer, async_client: AsyncClient) -> None:
    server.on("GET /v1/environments", answer({"items": [ENVIRONMENT], "next_cursor": None}))
    assert [one.name async for one in async_client.environments()] == ["nlp"]


# ------------------------------------------------------------------ on the command line

Run = Callable[..., Result]


@pytest.fixture
def run(wired: FakeServer) -> Run:
    def call(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


def test_submit_reads_the_file_beside_the_job_file(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    written(tmp_path, jobs_reqs="one\n-r ../more.txt", more="two")
    file = tmp_path / "jobs" / "job.yaml"
    file.write_text("name: lm\nrun:\n  command: x\n  environment: {requirements: reqs.txt}\n")
    wired.on("POST /v1/jobs", answer(job(), 201))
    run("submit", str(file))
    assert sent(wired, "POST /v1/jobs")["run"]["environment"] == {"requirements": ["one", "two"]}
    absent = run("submit", str(file), "--set", "run.environment.requirements=absent.txt", code=2)
    place = f"{file}:4:17: {FIELD}: cannot read {tmp_path}/jobs/absent.txt: No such file or directory"
    assert absent.stderr == f"error: {place}\n"
    user = run("submit", str(file), "--set", "run.environment.requirements=~nosuch/x", code=2)
    assert f"{file}:4:17: {FIELD} is '~nosuch/x': " in user.stderr


def test_create_says_how_to_use_it(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    wired.on("POST /v1/environments", answer(ENVIRONMENT, 201))
    path = written(tmp_path, a="one\n-c pins.txt")
    result = run("environment", "create", "nlp", "--requirements", str(path), code=2)
    assert result.stderr.startswith(f"error: {path}:2: requirements: -c is not taken here")
    path.write_text("one")
    made = run("environment", "create", "nlp", "--requirements", str(path), "--tenant", "research")
    assert made.stdout == (
        "nlp is registered for research, with 2 requirements; jobs use it as run.environment: {name: nlp}\n"
    )
    as_json = run("environment", "create", "nlp", "--requirements", str(path), "-o", "json")
    assert json.loads(as_json.stdout) == ENVIRONMENT


def test_list_and_show(wired: FakeServer, run: Run) -> None:
    wired.on("GET /v1/environments", answer({"items": [ENVIRONMENT], "next_cursor": None}))
    wired.on(f"GET /v1/environments/{ID}", answer(ENVIRONMENT))
    assert run("environment").stdout.splitlines()[1].split()[:3] == ["nlp", "research", "2"]
    assert json.loads(run("environment", "list", "-o", "json").stdout) == [ENVIRONMENT]
    for words in (["nlp"], ["nlp", "--tenant", "research"], [ID]):
        shown = run("environment", "show", *words).stdout
        assert "einops==0.8.1" in shown and "research  (by ada)" in shown
    assert (
        "there is no environment 'nlp' in vision"
        in run("environment", "show", "nlp", "--tenant", "vision", code=4).stderr
    )


def test_delete_needs_one_that_is_meant(wired: FakeServer, run: Run) -> None:
    other = {**ENVIRONMENT, "tenant": "research/nlp", "id": "env_" + "1" * 32}
    wired.on("GET /v1/environments", answer({"items": [ENVIRONMENT, other], "next_cursor": None}))
    wired.on(f"DELETE /v1/environments/{ID}", answer(None, 204))
    said = run("environment", "delete", "nlp", code=2).stderr
    assert "'nlp' is registered for several tenants: research, research/nlp; say which: --tenant" in said
    assert run("environment", "delete", "nlp", "--tenant", "research").stdout.startswith("nlp of research is deleted")
    wired.on(f"DELETE /v1/environments/{ID}", problem(403, "forbidden", "no"))
    run("environment", "delete", "nlp", "--tenant", "research", code=3)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"name": "nlp", "requirements": ["a", "b"]}, "nlp, 2 requirements"),
        ({"name": None, "requirements": ["a"]}, "1 requirement"),
        (None, None),
    ],
)
def test_show_says_what_a_job_runs_in(wired: FakeServer, run: Run, environment: Any, said: str | None) -> None:
    spec = {"resources": {}, "run": {"command": "x", "environment": environment}}
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job(spec=spec)))
    lines = [line.split(maxsplit=1) for line in run("show", JOB_ID).stdout.splitlines()]
    assert [rest.strip() for name, rest in lines if name == "environment"] == ([said] if said else [])


# ------------------------------------------------------------------ while one is built

BUILT = {"id": 1, "kind": "environment", "at": AT, "message": "Building nlp on node-0.", "data": {}, "node": "node-0"}


def test_events_of_environments_are_shown(wired: FakeServer, run: Run) -> None:
    wired.on(f"GET /v1/jobs/{JOB_ID}/events", answer({"items": [BUILT], "next_cursor": None}))
    assert "Building nlp on node-0." in run("events", JOB_ID).stdout
    wired.on(f"GET /v1/jobs/{JOB_ID}/events", stream(("event", "1", BUILT), ("end", "", {})))
    assert "environment      [node-0] Building nlp" in run("events", "-f", JOB_ID).stdout


async def test_who_follows_a_job_is_told_once(server: FakeServer, async_client: AsyncClient) -> None:
    server.on(f"GET /v1/jobs/{JOB_ID}", answer(job("starting")), answer(job("succeeded")))
    again = {**BUILT, "id": 2, "node": "node-1"}
    server.on(f"GET /v1/jobs/{JOB_ID}/events", stream(("event", "1", BUILT), ("event", "2", again), ("end", "", {})))
    lines: list[str] = []
    await follow(async_client, JOB_ID, PlainBoard(lines.append), poll_s=600.0)
    assert lines.count("Building nlp on node-0.") == 1


def test_the_live_board_shows_it_until_the_job_runs() -> None:
    board = LiveBoard()
    board.tell("Building nlp on node-0.")
    for state, shown in (("starting", True), ("running", False)):
        board.show(Job.from_json(job(state)))
        console = Console(file=io.StringIO(), width=200)
        console.print(board.render())
        assert ("Building nlp" in console.file.getvalue()) is shown  # type: ignore[attr-defined]
