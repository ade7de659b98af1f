"""`phalanx up` as far as it goes without Ray: its tokens, its command line, and a stop that comes in the middle."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from phalanx.cli.app import app
from phalanx_server import up_command
from phalanx_server.store.credentials import load_credential
from phalanx_server.store.embedded import PostgresFailed
from phalanx_server.store.tokens import given
from phalanx_server.supervise import Child
from phalanx_server.up_command import Machine, Up
from phalanx_server.up_stop import Stopped, StopRequest
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner


class RunningPostgres:
    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> str:
        return self.url


class StoppingPostgres(RunningPostgres):
    def __init__(self, stopped: list[str], url: str = "") -> None:
        super().__init__(url)
        self._stopped = stopped

    def stop(self) -> None:
        self._stopped.append("postgres")


def machine_at(data: Path) -> Machine:
    return Machine(data, "127.0.0.1", 0, nodes=1, gpus_per_node=2, gpu_type="emulated")


def started(data: Path, database: str) -> Up:
    """An `up` whose database has come up."""
    up = Up(machine_at(data), StopRequest())
    up.postgres = RunningPostgres(database)  # type: ignore[assignment]
    up._start_database()
    return up


def test_tokens_whose_files_are_lost_are_replaced(
    tmp_path: Path, database: str, engine: AsyncEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    first = started(tmp_path, database)
    assert started(tmp_path, database).admin_token == first.admin_token
    assert capsys.readouterr().err == ""

    (tmp_path / "admin-token").unlink()
    (tmp_path / "cluster-token").write_text("")  # as an `up` leaves it that is killed in that moment
    second = started(tmp_path, database)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("was missing: a new token is in it" in line for line in said)
    assert second.admin_token != first.admin_token and not second.first_run


async def test_the_tokens_in_their_place_are_good(tmp_path: Path, database: str, engine: AsyncEngine) -> None:
    await up_command.prepare_database(database)
    async with engine.connect() as conn:
        for name, wanted in up_command.REPLACEMENTS.items():
            made = given(await up_command.mint(database, wanted))
            found = await load_credential(conn, made.id)
            assert found is not None and name == f"{found.role}-token"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "{here}/file"], "file cannot be used (it is a file); choose another directory"),
        (["--data", "{here}/file/below"], "below cannot be used (Not a directory); choose another directory"),
        (["--data", "~nosuch/x"], "x cannot be used (Could not determine home directory.); choose another"),
        (["--port", "99999"], "Invalid value for '--port'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["up", *(word.format(here=tmp_path) for word in words)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr


def test_a_failure_is_said_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: Up) -> None:
        raise PostgresFailed("its log says [/tmp] and [red]")

    monkeypatch.setattr(Up, "start", failing)
    monkeypatch.setattr(Up, "stop", lambda _: None)
    assert up_command.bring_up(machine_at(tmp_path), []) == 1
    assert "phalanx up: its log says [/tmp] and [red]" in capsys.readouterr().err


def test_a_command_that_ends_by_the_same_ctrl_c_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # the command has ended
        up.stop_request.made = True

    up = Up(machine_at(tmp_path), StopRequest())
    assert up.run(["sh", "-c", "exit 5"]) == 5
    monkeypatch.setattr(up.family, "tick", interrupted)
    with pytest.raises(Stopped):
        up.run(["sh", "-c", "sleep 1; kill -INT $$"])


@pytest.mark.parametrize(("command", "code"), [([], 0), (["true"], 130)])
def test_what_fails_after_a_ctrl_c_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], code: int
) -> None:
    def interrupted(up: Up) -> None:
        up.stop_request.made = True
        raise PostgresFailed("initdb: it was interrupted")

    monkeypatch.setattr(Up, "start", interrupted)
    monkeypatch.setattr(Up, "stop", lambda _: None)
    assert up_command.bring_up(machine_at(tmp_path), command) == code


@pytest.mark.parametrize("agent_starts", [False, True])
def test_ranks_are_ended_by_a_stop_only_once_there_is_an_agent_that_can_end_them(
    tmp_path: Path, database: str, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, agent_starts: bool
) -> None:
    def wait(_: object, what: str) -> None:
        if not agent_starts and what == "Ray":
            raise Stopped

    async def end_attempts(_: str, **__: object) -> None:
        stopped.append("attempts")

    up = Up(machine_at(tmp_path), StopRequest())
    stopped: list[str] = []
    up.postgres = StoppingPostgres(stopped, database)  # type: ignore[assignment]
    up.family.start = lambda child: child  # type: ignore[method-assign]
    up.family.stop = lambda *_: stopped.append("family")  # type: ignore[method-assign]
    monkeypatch.setattr(up, "_wait", wait)
    monkeypatch.setattr(up_command, "end_attempts", end_attempts)
    with nullcontext() if agent_starts else pytest.raises(Stopped):
        up.start()
    up.stop()
    assert stopped == [*(["attempts"] if agent_starts else []), "family", "postgres"]


def test_a_stop_without_its_database_stops_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    up = Up(machine_at(tmp_path), StopRequest())
    up.database_url = "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"
    stopped: list[str] = []
    up.scheduler = Child("scheduler", [], {}, tmp_path / "log")
    up.agent = Child("agent", [], {}, tmp_path / "log")
    up.family.stop = lambda *_: stopped.append("family")  # type: ignore[method-assign]
    up.postgres = StoppingPostgres(stopped)  # type: ignore[assignment]
    up.stop()
    assert stopped == ["family", "postgres"]
    assert "what ran could not be put back into the queue" in capsys.readouterr().err
