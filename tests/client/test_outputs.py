"""What a job left, listed and fetched: whole files or none, below the directory that was asked for and nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fake_server import AT, JOB_ID, FakeServer, answer, job, problem
from phalanx import errors
from phalanx.cli.app import app
from phalanx.client import AsyncClient, Client
from typer.testing import CliRunner, Result

Run = Callable[..., Result]
URL = f"/v1/jobs/{JOB_ID}/outputs"


def item(path: str, content: bytes = b"x", **fields: Any) -> dict[str, Any]:
    shown = {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return shown | {"attempt": 1, "group_rank": 0, "created_at": AT} | fields


def left(server: FakeServer, files: dict[str, bytes], *more: dict[str, Any]) -> None:
    """The job has left these."""
    server.on(f"GET {URL}", answer({"items": [*(item(*file) for file in files.items()), *more], "next_cursor": None}))
    for path, content in files.items():
        server.on(f"GET {URL}/{path}", httpx.Response(200, content=content))


def tree(directory: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.fixture
def run(wired: FakeServer) -> Run:
    def call(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["outputs", JOB_ID, *words])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


# ------------------------------------------------------------------ the SDK

FILES = {"model.pt": b"weights", "logs/a b/ü%2F.txt": b"hello", "empty": b""}


def test_everything_is_fetched_under_its_own_path(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, FILES)
    fetched = client.download_outputs(JOB_ID, tmp_path / "new" / "results")
    assert tree(tmp_path / "new" / "results") == FILES
    assert [(one.output.path, one.fresh) for one in fetched] == [(path, True) for path in FILES]
    asked = server.requests[-1].url
    assert asked.params["attempt"] == "1" and asked.params["group_rank"] == "0"
    assert server.requests[-2].url.raw_path.decode().split("?")[0] == f"{URL}/{quote('logs/a b/ü%2F.txt')}"


async def test_so_it_is_by_the_async_client(server: FakeServer, async_client: AsyncClient, tmp_path: Path) -> None:
    left(server, FILES)
    await async_client.download_outputs(JOB_ID, tmp_path)
    assert {name: content for name, content in tree(tmp_path).items() if name in FILES} == FILES
    assert [one.path async for one in async_client.outputs(JOB_ID)] == list(FILES)
    assert await async_client.download_output(JOB_ID, "empty", tmp_path / "e") == hashlib.sha256().hexdigest()


def test_what_is_there_is_not_fetched_again(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, FILES)
    client.download_outputs(JOB_ID, tmp_path)
    (tmp_path / "model.pt").write_bytes(b"another")
    before = len(server.requests)
    fetched = client.download_outputs(JOB_ID, tmp_path)
    assert [one.fresh for one in fetched] == [True, False, False]
    assert len(server.requests) == before + 2 and (tmp_path / "model.pt").read_bytes() == b"weights"


def test_patterns_choose(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, FILES)
    client.download_outputs(JOB_ID, tmp_path / "a", patterns=["*.pt", "logs"])
    assert tree(tmp_path / "a") == {path: FILES[path] for path in ("model.pt", "logs/a b/ü%2F.txt")}


def test_of_several_groups_one_is_taken(server: FakeServer, client: Client, tmp_path: Path) -> None:
    server.on(f"GET {URL}", answer({"items": [item("x", group_rank=2), item("x", group_rank=1)], "next_cursor": None}))
    server.on(f"GET {URL}/x", httpx.Response(200, content=b"x"))
    assert len(client.download_outputs(JOB_ID, tmp_path)) == 1
    assert server.requests[-1].url.params["group_rank"] == "1"
    assert client.download_outputs(JOB_ID, tmp_path / "b", group_rank=2)[0].output.group_rank == 2
    assert client.download_outputs(JOB_ID, tmp_path / "c", group_rank=3) == []


def test_a_list_of_several_pages_is_fetched_whole(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, {"a": b"1", "b": b"2"})
    server.on(
        f"GET {URL}",
        answer({"items": [item("a", b"1")], "next_cursor": "c"}),
        answer({"items": [item("b", b"2")], "next_cursor": None}),
    )
    client.download_outputs(JOB_ID, tmp_path / "to")
    assert tree(tmp_path / "to") == {"a": b"1", "b": b"2"}


class Broken(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"wei"
        raise httpx.ReadError("connection reset")


def test_a_download_that_breaks_off_is_tried_again(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, {"model.pt": b"weights"})
    server.on(
        f"GET {URL}/model.pt",
        httpx.Response(200, stream=Broken()),
        problem(503, "unavailable", retry_after="1"),
        httpx.Response(200, content=b"weights"),
    )
    client.download_outputs(JOB_ID, tmp_path / "to")
    assert tree(tmp_path / "to") == {"model.pt": b"weights"}


def test_a_file_that_arrives_damaged_or_not_at_all_leaves_what_was_there(
    server: FakeServer, client: Client, tmp_path: Path
) -> None:
    left(server, {"model.pt": b"weights"})
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "model.pt").write_bytes(b"old")
    server.on(f"GET {URL}/model.pt", httpx.Response(200, content=b"damaged"))
    with pytest.raises(errors.ProtocolError, match="arrived damaged"):
        client.download_outputs(JOB_ID, tmp_path / "to")
    server.on(f"GET {URL}/model.pt", problem(404, "not_found"))
    with pytest.raises(errors.NotFound):
        client.download_outputs(JOB_ID, tmp_path / "to")
    assert tree(tmp_path / "to") == {"model.pt": b"old"}


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "..", "", "a//b", "./x", "x\0"])
def test_a_path_that_leads_elsewhere_is_refused(server: FakeServer, client: Client, tmp_path: Path, path: str) -> None:
    left(server, {}, item(path))
    with pytest.raises(errors.OutputError, match="no path to write to"):
        client.download_outputs(JOB_ID, tmp_path / "to")
    assert tree(tmp_path) == {} and len(server.requests) == 1


def test_a_link_on_the_way_out_is_not_followed(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, {"out/x": b"x"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(errors.OutputError, match="leads out of"):
        client.download_outputs(JOB_ID, tmp_path / "to")
    assert tree(tmp_path / "elsewhere") == {}


def test_a_link_in_the_place_of_a_file_is_replaced(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, {"x": b"x"})
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "x").symlink_to(tmp_path / "precious")
    client.download_outputs(JOB_ID, tmp_path / "to")
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "to" / "x").is_symlink()


def test_something_in_the_way_is_told(server: FakeServer, client: Client, tmp_path: Path) -> None:
    left(server, {"a/b": b"x", "c": b"x"})
    (tmp_path / "a").write_bytes(b"a file")
    with pytest.raises(errors.OutputError, match="a/b cannot be written into"):
        client.download_outputs(JOB_ID, tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(errors.OutputError, match="c cannot be written into"):
        client.download_outputs(JOB_ID, tmp_path, patterns=["c"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".phalanx-")] == []


# ------------------------------------------------------------------ the command


def test_outputs_are_listed(wired: FakeServer, run: Run) -> None:
    left(wired, FILES)
    lines = run().stdout.splitlines()
    assert lines[0].split()[:4] == ["PATH", "BYTES", "ATTEMPT", "GROUP"] and lines[1].split()[:4] == [
        "model.pt",
        "7",
        "1",
        "0",
    ]
    assert [one["path"] for one in json.loads(run("*.pt", "-o", "json").stdout)] == ["model.pt"]
    assert "model.pt" in run("-o", "yaml").stdout


@pytest.mark.parametrize(
    ("state", "said"),
    [("failed", "lm has left no outputs. Kept is"), ("running", "lm is running: outputs are collected when its ranks")],
)
def test_a_job_without_outputs_says_how_it_would_leave_some(wired: FakeServer, run: Run, state: str, said: str) -> None:
    left(wired, {})
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(job(state)))
    told = run().stderr
    assert told.startswith(said) and "$PHALANX_OUTPUT_DIR" in told and "run.outputs of the job file" in told
    asked = job(state)
    asked["spec"]["run"]["outputs"] = ["out/[ab]*"]
    wired.on(f"GET /v1/jobs/{JOB_ID}", answer(asked))
    assert "workdir what fits out/[ab]*." in run().stderr
    assert run("-o", "json").stdout.strip() == "[]"


def test_a_pattern_that_fits_nothing_is_not_found(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    left(wired, FILES)
    assert "no output of" in run("*.ckpt", code=4).stderr
    run("*.ckpt", "--to", str(tmp_path / "to"), code=4)
    assert not (tmp_path / "to").exists()


def test_outputs_are_fetched(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    left(wired, FILES)
    assert run("--to", str(tmp_path / "to")).stdout == f"3 files (12 bytes) fetched into {tmp_path / 'to'}\n"
    assert tree(tmp_path / "to") == FILES
    assert (
        "0 files (0 bytes) fetched" in (again := run("--to", str(tmp_path / "to")).stdout) and "3 were there" in again
    )
    (one,) = json.loads(run("*.pt", "--to", str(tmp_path / "to"), "-o", "json").stdout)
    assert one["file"] == str(tmp_path / "to" / "model.pt") and one["fresh"] is False


def test_files_of_other_groups_are_mentioned(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    left(wired, {"x": b"x"}, item("x", group_rank=1))
    assert "1 file of other groups" in run("--to", str(tmp_path / "to")).stderr
    assert run("--to", str(tmp_path / "to"), "--group", "1").stderr == ""


def test_how_it_fails(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    wired.on(f"GET {URL}", problem(404, "not_found"))
    run(code=4)
    left(wired, {}, item("../x"))
    run("--to", str(tmp_path / "to"), code=1)
    (tmp_path / "file").touch()
    run("--to", str(tmp_path / "file"), code=2)
    left(wired, {"model.pt": b"weights"})
    wired.on(f"GET {URL}/model.pt", problem(503, "unavailable"))
    run("--to", str(tmp_path / "to"), code=6)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_is_not_ours_is_told(wired: FakeServer, run: Run, tmp_path: Path) -> None:
    left(wired, FILES)
    tmp_path.chmod(0o500)
    assert "cannot be written" in run("--to", str(tmp_path / "to"), code=1).stderr
