"""`phalanx server`: what it refuses to start on, and that a real process serves and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from phalanx_server import server_command
from phalanx_server.store.migrate import HEAD, current, downgrade
from typer import Typer
from typer.testing import CliRunner

DEADLINE_S = 30.0


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Typer:
    for name in [name for name in os.environ if name.startswith("PHALANX_")]:
        monkeypatch.delenv(name)
    app = Typer()
    server_command.register(app)
    return app


def run(command: Typer, *arguments: str, **env: str) -> Any:
    return CliRunner().invoke(command, arguments, env=env)


def test_without_a_database_it_says_what_to_set(command: Typer) -> None:
    result = run(command)
    assert result.exit_code == 2 and "PHALANX_DATABASE_URL is not set" in result.output
    assert len(result.output.splitlines()) == 1


def test_a_wrong_setting_is_named(command: Typer) -> None:
    result = run(command, PHALANX_DATABASE_URL="postgresql://x/y", PHALANX_FENCE_S="soon")
    assert result.exit_code == 2 and "PHALANX_FENCE_S" in result.output
    result = run(command, PHALANX_DATABASE_URL="mysql://x/y")
    assert result.exit_code == 2 and "must be PostgreSQL" in result.output


def test_an_unreachable_database_is_one_line(command: Typer, tmp_path: Path) -> None:
    result = run(command, PHALANX_DATABASE_URL=f"postgresql://nobody@/x?host={tmp_path}")
    assert result.exit_code == 6 and "cannot use the database" in result.output
    assert "Traceback" not in result.output


async def test_a_database_that_was_never_migrated(command: Typer, empty_database: str) -> None:
    result = await asyncio.to_thread(run, command, PHALANX_DATABASE_URL=empty_database)
    assert result.exit_code == 6 and "never been migrated" in result.output and "--migrate" in result.output


async def test_a_database_of_an_older_version(command: Typer, database: str) -> None:
    await downgrade(database, "0001")
    result = await asyncio.to_thread(run, command, PHALANX_DATABASE_URL=database)
    assert result.exit_code == 6 and "at schema 0001" in result.output and HEAD in result.output


async def test_the_first_migration_prints_the_first_tokens_and_the_second_none(
    empty_database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await server_command.check_database(empty_database, upgrade=True)
    assert capsys.readouterr().err.count("phx_") == 2
    await server_command.check_database(empty_database, upgrade=True)
    assert "phx_" not in capsys.readouterr().err


async def test_it_migrates_serves_and_stops(empty_database: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PHALANX_")}
    env |= {"PHALANX_DATABASE_URL": empty_database, "PHALANX_DATA_DIR": str(tmp_path), "PHALANX_LOG_FORMAT": "json"}
    script = (
        "import typer; from phalanx_server import server_command; app = typer.Typer();"
        "server_command.register(app); app()"
    )
    argv = [sys.executable, "-c", script, "--migrate", "--port", str(port)]
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        await until_ready(f"http://127.0.0.1:{port}/readyz", process)
        assert await current(empty_database) == HEAD
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate, timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in log


async def until_ready(url: str, process: subprocess.Popen[str]) -> None:
    async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient() as client:
        while process.poll() is None:
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    raise AssertionError(f"the server ended with {process.returncode}")
