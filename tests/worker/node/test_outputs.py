"""What ranks leave is brought to the server before their group ends; what they plant to be brought along is not."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phalanx_worker.node import offences, outputs, ranks, uploads
from phalanx_worker.node.outputs import Limits, OutputFile, Source

pytestmark = pytest.mark.asyncio(loop_scope="session")

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOBODY = 65_533


def collected(path: Path, *patterns: str, uid: int | None = None, limits: Limits | None = None) -> outputs.Collected:
    source = Source(str(path / "output"), str(path / "work"), list(patterns), uid, limits or Limits())
    return outputs.collect(source, threading.Event())


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """The directories of a group."""
    for name in ("output", "work"):
        (tmp_path / name).mkdir()
    return tmp_path


def paths(found: outputs.Collected) -> list[str]:
    return [file.path for file in found.files]


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ------------------------------------------------------------------ which files


async def test_everything_in_the_output_directory_and_what_fits_in_the_working_directory(places: Path) -> None:
    for name in ("output/a", "output/b/.c", "work/out/d", "work/out/e/f", "work/train.py", "work/x.pt"):
        write(places / name)
    assert paths(collected(places)) == ["a", "b/.c"]
    found = collected(places, "out/**", "*.pt")
    assert paths(found) == ["a", "b/.c", "out/d", "out/e/f", "x.pt"]
    assert found.left_out_sentence() == ""


async def test_patterns_that_no_file_fits_are_found(places: Path) -> None:
    write(places / "output/model.pt")
    write(places / "work/out/a.txt")
    (places / "work/empty").mkdir()
    (places / "work/link").symlink_to("nowhere")
    patterns = ("out", "out/*.txt", "*.csv", "empty/**", "link", "model.pt")
    assert collected(places, *patterns).unmatched == ["*.csv", "empty/**"]
    assert collected(places).unmatched == []


async def test_where_not_everything_was_looked_at_nobody_knows_what_fits(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        write(places / f"work/{number}")
    monkeypatch.setattr(outputs, "LOOKED_AT_MAX", 10)
    assert collected(places, "*.csv").unmatched == []


async def test_where_both_have_a_path_the_output_directory_wins(places: Path) -> None:
    write(places / "output/out/a", "mine")
    write(places / "work/out/a")
    (file,) = (found := collected(places, "out")).files
    assert file.root == str(places / "output") and found.left_out == {outputs.TWICE: 1}


async def test_links_pipes_and_sockets_are_left_out_and_block_nobody(places: Path) -> None:
    write(places / "secret/key")
    out = places / "output"
    (out / "passwd").symlink_to("/etc/passwd")
    (out / "dangling").symlink_to("nowhere")
    (out / "directory").symlink_to(places / "secret", target_is_directory=True)
    os.mkfifo(out / "pipe")
    write(out / "real")
    (places / "work" / "out").symlink_to(places / "secret", target_is_directory=True)
    found = collected(places, "out/**")
    assert paths(found) == ["real"]
    assert found.left_out == {outputs.NO_FILE: 5}
    assert "5 links, pipes or devices" in found.left_out_sentence()


async def test_a_directory_that_became_a_link_is_not_entered(places: Path) -> None:
    write(places / "secret/key")
    (places / "output").rmdir()
    (places / "output").symlink_to(places / "secret", target_is_directory=True)
    assert collected(places).files == []


async def test_a_file_that_became_something_else_is_not_read(places: Path) -> None:
    write(places / "secret/key", "abc")
    inner = write(places / "output/a/b", "abc").parent
    (file,) = collected(places).files
    os.close(outputs.open_file(file, None))
    inner.rename(places / "output/moved")
    inner.symlink_to(places / "secret", target_is_directory=True)
    with pytest.raises(OSError):
        outputs.open_file(file, None)
    with pytest.raises(OSError):
        outputs.open_file(OutputFile(file.root, "a/key", 3), None)
    inner.unlink()
    inner.mkdir()
    os.mkfifo(inner / "b")
    with pytest.raises(OSError):
        outputs.open_file(file, None)
    (inner / "b").unlink()
    (inner / "b").symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        outputs.open_file(file, None)
    (inner / "b").unlink()
    write(inner / "b", "longer than it was")
    with pytest.raises(OSError, match="changed"):
        outputs.open_file(file, None)


@AS_ROOT
async def test_what_belongs_to_another_user_is_left_out(places: Path) -> None:
    """A hard link to a file of root, say, on a system that lets anybody make one."""
    write(places / "secret", "root's")
    os.link(places / "secret", places / "output/linked")
    own = write(places / "output/own")
    os.chown(own, NOBODY, NOBODY)
    found = collected(places, uid=NOBODY)
    assert paths(found) == ["own"] and found.left_out == {outputs.FOREIGN: 1}
    with pytest.raises(OSError):
        outputs.open_file(OutputFile(str(places / "output"), "linked", 6), NOBODY)


async def test_names_that_cannot_be_stored_are_left_out(places: Path) -> None:
    out = places / "output"
    for name in ("a\nb", "a\x1b[2J", "\u2028", "a\u202egpj.sh", "fine ü"):
        write(out / name)
    os.close(os.open(os.fsencode(out) + b"/\xff\xfe", os.O_CREAT))
    deep = out.joinpath(*["d" * 250] * 5)
    write(deep / "file")
    found = collected(places)
    assert paths(found) == ["fine ü"] and found.left_out == {outputs.BAD_NAME: 6}


async def test_there_are_bounds_and_the_rest_is_counted(places: Path) -> None:
    for number in range(30):
        write(places / f"output/{number:02}", "x" * 10)
    few = collected(places, limits=Limits(files=7))
    assert paths(few) == [f"{number:02}" for number in range(7)]
    assert few.left_out_sentence() == "Output files were left out: 23 over the limit of 7 files."
    write(places / "output/00", "x" * 1000)
    small = collected(places, limits=Limits(bytes=105))
    assert paths(small) == [f"{number:02}" for number in range(1, 11)] and sum(small.left_out.values()) == 20


async def test_a_file_that_only_claims_to_be_huge_is_left_out(places: Path) -> None:
    with (places / "output/sparse").open("wb") as file:
        file.truncate(11 << 30)
    assert collected(places).left_out == {f"over the limit of {10 << 30:,} bytes": 1}


async def test_half_of_twenty_thousand_files_is_taken(places: Path) -> None:
    for number in range(20_000):
        os.close(os.open(places / f"output/{number}", os.O_CREAT))
    found = collected(places)
    assert len(found.files) == 10_000 and found.left_out == {"over the limit of 10,000 files": 10_000}


async def test_more_than_anybody_should_look_at_ends_it(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LOOKED_AT_MAX", 10)
    for number in range(10):
        write(places / f"output/{number:02}/file")
    found = collected(places)
    assert not found.all_seen and "whatever comes after" in found.left_out_sentence()


async def test_a_tree_without_a_bottom_is_left(places: Path) -> None:
    write(places.joinpath("output", *["d"] * 100, "file"))
    assert collected(places).left_out == {outputs.TOO_DEEP: 1}


async def test_looking_takes_a_bounded_time(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns may be such that each name takes long: hours for all of them. It ends within a directory, too."""
    for number in range(300):
        os.close(os.open(places / f"work/{number}", os.O_CREAT))
    write(places / "output/a")
    looks = itertools.count()
    monkeypatch.setattr(outputs, "time", SimpleNamespace(monotonic=lambda: next(looks) / 10))  # 0.1 s for each
    found = collected(places, "**/x", limits=Limits(look_s=10))
    assert next(looks) < 110
    assert paths(found) == ["a"] and not found.all_seen
    assert "whatever comes after" in found.left_out_sentence()


async def test_looking_ends_at_once_where_it_is_given_up(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        write(places / f"output/{number:03}")
    given_up = threading.Event()
    is_fit = outputs._is_fit

    def give_up(path: str) -> bool:
        given_up.set()
        return is_fit(path)

    monkeypatch.setattr(outputs, "_is_fit", give_up)
    found = outputs.collect(Source(str(places / "output"), str(places / "work"), [], None), given_up)
    assert paths(found) == ["000"] and not found.all_seen


@pytest.mark.skipif(os.geteuid() == 0, reason="root looks into everything")
async def test_a_directory_whose_files_cannot_be_looked_at_is_told(places: Path) -> None:
    write(places / "output/listed/file").parent.chmod(0o400)
    assert collected(places).left_out == {outputs.UNREADABLE: 1}


async def test_what_the_disk_does_not_tell_is_told_and_costs_no_other_file(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(places / "output/b/file")
    write(places / "output/c")
    write(places / "output/d")
    scandir, stat = os.scandir, os.stat

    def failing_scandir(fd: int) -> Any:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "b":
            raise OSError(5, "Input/output error")
        return scandir(fd)

    def failing_stat(name: Any, *rest: Any, **more: Any) -> Any:
        if name == "c":
            raise PermissionError(13, "Permission denied")
        return stat(name, *rest, **more)

    monkeypatch.setattr(os, "scandir", failing_scandir)
    monkeypatch.setattr(os, "stat", failing_stat)
    found = collected(places)
    assert paths(found) == ["d"] and found.left_out == {outputs.UNREADABLE: 2}


async def test_only_what_may_fit_is_looked_at(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        write(places / f"work/src/{number}")
    write(places / "work/out/a")
    monkeypatch.setattr(outputs, "LOOKED_AT_MAX", 10)
    found = collected(places, "out/**", "*.pt")
    assert paths(found) == ["out/a"] and found.all_seen


# ------------------------------------------------------------------ real ranks


WRITE = """sh -c 'echo $RANK > "$PHALANX_OUTPUT_DIR/rank-$RANK"; mkdir -p out; echo hello > out/$RANK.txt; {then}'"""

WAIT = "echo written; sleep 60"


def left(attempt: Any) -> dict[tuple[int, str], bytes]:
    return {key[1:]: body for key, body in attempt.server.outputs.items() if key[0] == attempt.id}


def notes(attempt: Any) -> list[str]:
    return [mark["data"]["message"] for mark in attempt.server.marks(attempt.id, "note")]


async def test_what_ranks_leave_is_there_when_their_group_ends(workbench: Any) -> None:
    attempt = workbench.attempt(WRITE.format(then="true"), nodes=2, ranks=2, outputs=["out/**"])
    await attempt.start()
    for runner in attempt.runners:
        await attempt.group(runner)
    assert left(attempt) == {
        (rank // 2, name): text
        for rank in range(4)
        for name, text in [(f"rank-{rank}", f"{rank}\n".encode()), (f"out/{rank}.txt", b"hello\n")]
    }
    assert notes(attempt) == []


@pytest.mark.parametrize("then", ["exit 3", "kill -9 $$"])
async def test_a_rank_that_fails_leaves_its_files_too(workbench: Any, then: str) -> None:
    attempt = workbench.attempt(WRITE.format(then=then))
    await attempt.start()
    await attempt.group()
    assert left(attempt) == {(0, "rank-0"): b"0\n"}


async def test_a_job_that_leaves_nothing_asks_nothing_of_the_server(workbench: Any) -> None:
    tries = workbench.server.output_tries
    attempt = workbench.attempt("true")
    assert (await attempt.run())[0]["exit_code"] == 0
    assert workbench.server.output_tries == tries and notes(attempt) == []


async def test_patterns_that_no_file_fits_are_told(workbench: Any) -> None:
    attempt = workbench.attempt("sh -c 'mkdir empty; echo a > a.txt'", outputs=["out/**", "*.txt", "empty"])
    await attempt.run()
    assert left(attempt) == {(0, "a.txt"): b"a\n"}
    assert notes(attempt) == ["No file in the working directory fits out/** or empty (run.outputs)."]


async def test_of_several_nodes_that_of_rank_0_tells_of_patterns(workbench: Any) -> None:
    attempt = workbench.attempt("true", nodes=2, outputs=["out/**"])
    await attempt.start()
    for runner in attempt.runners:
        await attempt.group(runner)
    node = attempt.desired.groups[0].node
    assert notes(attempt) == [f"No file in the working directory on {node} fits out/** (run.outputs)."]


async def test_a_rank_that_failed_is_not_told_what_it_did_not_leave(workbench: Any) -> None:
    attempt = workbench.attempt("sh -c 'exit 3'", outputs=["out/**"])
    await attempt.run()
    assert notes(attempt) == []


async def test_what_was_left_out_is_told(workbench: Any) -> None:
    attempt = workbench.attempt("""sh -c 'cd $PHALANX_OUTPUT_DIR; ln -s /etc/passwd a; mkfifo b; echo > c'""")
    await attempt.run()
    assert left(attempt) == {(0, "c"): b"\n"}
    assert notes(attempt) == ["Output files were left out: 2 links, pipes or devices."]


async def test_code_that_came_with_the_job_counts_where_it_fits(workbench: Any) -> None:
    attempt = workbench.attempt("sh -c 'echo a > config.yaml; echo b > other'", outputs=["*.yaml"])
    await attempt.run()
    assert left(attempt) == {(0, "config.yaml"): b"a\n"}


async def test_a_large_file_arrives_whole(workbench: Any) -> None:
    command = """sh -c 'head -c 5000001 /dev/urandom > $PHALANX_OUTPUT_DIR/big; sha256sum < $PHALANX_OUTPUT_DIR/big'"""
    attempt = workbench.attempt(command)
    await attempt.run()
    assert hashlib.sha256(left(attempt)[0, "big"]).hexdigest() in attempt.server.text(attempt.id, rank=0)


# ------------------------------------------------------------------ a server that fails


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_PAUSE_S", (0.01, 0.05))


async def own_attempt(
    light_runner: Any, server: Any, make_workbench: Any, path: Path, command: str, **more: Any
) -> Any:
    """On a runner and a server of the test's own."""
    runner = await light_runner(server, **more)
    return make_workbench([runner], server, path).attempt(command)


async def test_a_try_that_fails_is_repeated(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None
) -> None:
    server.output_answers = [500, 503, 401, 200]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.run()
    assert left(attempt) == {(0, "rank-0"): b"0\n"} and notes(attempt) == []


async def test_a_connection_that_breaks_off_is_no_verdict_on_a_file(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None
) -> None:
    """So it looks when the server says that it is overloaded, and does not read the file to its end to say so."""
    server.output_answers = [*[0] * 10, 200]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.run()
    assert left(attempt) == {(0, "rank-0"): b"0\n"} and notes(attempt) == []


async def test_a_connection_that_breaks_off_over_and_over_does_not_keep_a_group_from_ending(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_CUTS_BORNE", 7)
    server.output_answers = [0]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.run()
    assert server.output_tries == 7 and "broke off" in notes(attempt)[0]


@pytest.mark.parametrize(
    ("status", "why", "tries"),
    [(500, "failed over a file again and again", 6), (422, "did not take", 1), (404, "any more", 1), (413, "take", 1)],
)
async def test_a_server_that_takes_no_files_does_not_keep_a_group_from_ending(
    light_runner: Any,
    server: Any,
    make_workbench: Any,
    tmp_path: Path,
    quick: None,
    status: int,
    why: str,
    tries: int,
) -> None:
    server.output_answers = [status]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    (end,) = await attempt.run()
    assert end["exit_code"] == 0 and server.output_tries == tries
    (note,) = notes(attempt)
    assert note.startswith("1 output file (2 bytes) could not be delivered, for example rank-0") and why in note


async def test_an_attempt_that_is_not_live_any_more_costs_one_try_for_each_sender(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    server.output_answers = [404]
    command = """sh -c 'cd $PHALANX_OUTPUT_DIR; for i in $(seq 100); do echo > $i; done'"""
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, command)
    await attempt.run()
    assert server.output_tries <= uploads.TOGETHER
    assert notes(attempt)[0].startswith("100 output files (100 bytes)")


async def test_files_wait_for_a_server_that_is_away(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than they would have with a server that is there."""
    monkeypatch.setattr(uploads, "BUDGET_S", 1.5)
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="sleep 1.2"))
    await attempt.start()
    await server.stop()
    await asyncio.sleep(4.5)
    (row,) = (await attempt.runners[0].next_facts(-1, 0))["groups"]
    assert row["state"] == "running" and row["exits"], "its ranks are done, it is not"
    await server.start()
    await attempt.exits()
    assert left(attempt) == {(0, "rank-0"): b"0\n"}


async def test_an_outage_that_is_too_long_ends_the_waiting(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None
) -> None:
    attempt = await own_attempt(
        light_runner, server, make_workbench, tmp_path, WRITE.format(then="sleep 0.5"), outage_tolerance_s=3.0
    )
    await attempt.start()
    await server.stop()
    await attempt.group()
    await server.start()
    await attempt.exits()
    assert left(attempt) == {}
    assert any("could not be delivered" in note for note in notes(attempt))


async def test_time_is_bounded_where_the_storage_is_away(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BUDGET_S", 0.5)
    server.output_answers = [429]  # as good as any that says: later
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.run()
    assert notes(attempt)[0].endswith("the time for it was over.")


# ------------------------------------------------------------------ stopped, killed


async def collecting(attempt: Any, server: Any) -> None:
    """Until its files are on their way."""
    async with asyncio.timeout(10):
        while not server.output_tries:  # noqa: ASYNC110 - the fake server has no event for it
            await asyncio.sleep(0.02)


async def test_a_stop_leaves_the_rest_of_its_grace_but_some_seconds_at_least(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_COLLECT_S", 1.0)
    server.output_answers = [429]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then=WAIT))
    await attempt.start()
    await attempt.printed("written")
    began = time.monotonic()
    await attempt.runners[0].stop_group(attempt.id, 0.0)
    (end,) = await attempt.exits()
    assert end["signal"] and not end["before_stop"] and 1.0 <= time.monotonic() - began < 5.0
    assert notes(attempt)[0].endswith("the time for it was over.")


async def test_a_stop_shortens_what_is_under_way(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_COLLECT_S", 0.1)
    server.output_answers = [429]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.start()
    await collecting(attempt, server)
    await attempt.runners[0].stop_group(attempt.id, 0.5)
    began = time.monotonic()
    (end,) = await attempt.exits()
    assert time.monotonic() - began < 5.0
    assert end["before_stop"], "its job was done when something else was to have its GPUs"


async def test_the_stop_that_follows_a_failure_does_not(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is meant for the others of the gang: the files of the group that failed tell why it did."""
    monkeypatch.setattr(ranks, "_COLLECT_S", 0.1)
    server.output_answers = [429]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="exit 3"))
    await attempt.start()
    await collecting(attempt, server)
    await attempt.runners[0].stop_group(attempt.id, 0.0)
    await asyncio.sleep(0.5)
    server.output_answers = [200]
    await attempt.exits()
    assert left(attempt) == {(0, "rank-0"): b"0\n"}


async def test_ranks_that_are_done_are_not_ended_for_what_they_have_written(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    """The node goes on counting what lies in their directories while it is collected."""
    server.output_answers = [429]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.start()
    await collecting(attempt, server)
    (group,) = attempt.runners[0]._groups()
    group.fail(offences.disk_full(2, 1))
    server.output_answers = [200]
    (end,) = await attempt.exits()
    assert end["exit_code"] == 0 and notes(attempt) == []


async def test_a_kill_collects_nothing(light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path) -> None:
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then=WAIT))
    await attempt.start()
    await attempt.printed("written")
    await attempt.runners[0].kill_group(attempt.id)
    await attempt.exits()
    assert left(attempt) == {} and server.output_tries == 0


async def test_a_kill_ends_what_is_under_way_and_the_attempt_can_be_forgotten(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    server.output_answers = [429]
    attempt = await own_attempt(light_runner, server, make_workbench, tmp_path, WRITE.format(then="true"))
    await attempt.start()
    await collecting(attempt, server)
    began = time.monotonic()
    await attempt.forget()
    assert time.monotonic() - began < 5.0
    assert not any(os.scandir(tmp_path / "light" / "attempts"))


# ------------------------------------------------------------------ own users


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """A directory that other users may enter (pytest's own is private)."""
    path = Path(tempfile.mkdtemp(prefix="phx-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@AS_ROOT
async def test_a_rank_cannot_make_the_runner_read_for_it(
    light_runner: Any, server: Any, make_workbench: Any, world_readable: Path
) -> None:
    """The runner is root, and reads directories in which a tenant does as it likes."""
    runner = await light_runner(server, name=world_readable / "node", own_users=True, checkpoint_root=None)
    assert runner.capabilities()["own_users"], runner.capabilities()["own_users_problem"]
    command = (
        "cd $PHALANX_OUTPUT_DIR; stat -c %u-%a .; echo mine > mine; ln -s /etc/shadow link; ln -s /etc dir;"
        " ln /etc/passwd hard; mkfifo pipe; mkdir closed; echo > closed/x; chmod 0 closed;"
        " ln -s /etc $HOME/../work/out; true"
    )
    bench = make_workbench([runner], server, world_readable)
    attempt = bench.attempt(f"sh -c '{command}'", uid=70123, outputs=["out/**", "../../../../etc/*"])
    assert (await attempt.run())[0]["exit_code"] == 0
    assert server.text(attempt.id, rank=0) == "70123-700\n"
    assert left(attempt) == {(0, "mine"): b"mine\n", (0, "closed/x"): b"\n"}
    left_out, unmatched = notes(attempt)
    assert "4 links, pipes or devices" in left_out and unmatched.endswith("fits ../../../../etc/* (run.outputs).")
