"""`phalanx migrate`: what an installation runs before the servers, and the first tokens that it brings along."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from phalanx_server import server_command
from phalanx_server.api.auth import Authenticator
from phalanx_server.api.errors import Problem
from phalanx_server.store.engine import create_engine
from phalanx_server.store.migrate import HEAD, current
from phalanx_server.store.tokens import given, mint
from typer import Typer
from typer.testing import CliRunner

ADMIN, CLUSTER = "PHALANX_BOOTSTRAP_ADMIN_TOKEN_FILE", "PHALANX_BOOTSTRAP_CLUSTER_TOKEN_FILE"


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Typer:
    for name in [name for name in os.environ if name.startswith("PHALANX_")]:
        monkeypatch.delenv(name)
    app = Typer()
    server_command.register_migration(app)
    return app


@pytest.fixture
def tokens() -> dict[str, str]:
    return {name: mint().text for name in (ADMIN, CLUSTER)}


@pytest.fixture
def files(tmp_path: Path, tokens: dict[str, str]) -> dict[str, str]:
    """The tokens in files, by variable."""
    for name, text in tokens.items():
        (tmp_path / name).write_text(text + "\n")
    return {name: str(tmp_path / name) for name in tokens}


def run(app: Typer, *arguments: str, **env: str) -> Any:
    return CliRunner().invoke(app, arguments, env=env)


async def role_of(url: str, token: str) -> str:
    engine = create_engine(url)
    try:
        return (await Authenticator(engine, cache_s=0).credential(f"Bearer {token}")).role
    finally:
        await engine.dispose()


async def test_given_tokens_are_the_first_ones_and_are_not_printed(
    app: Typer, empty_database: str, tokens: dict[str, str], files: dict[str, str]
) -> None:
    result = await asyncio.to_thread(run, app, "migrate", PHALANX_DATABASE_URL=empty_database, **files)
    assert result.exit_code == 0 and "phx_" not in result.output
    assert await current(empty_database) == HEAD
    assert await role_of(empty_database, tokens[ADMIN]) == "admin"
    assert await role_of(empty_database, tokens[CLUSTER]) == "cluster"


async def test_a_database_in_use_takes_no_given_tokens(
    app: Typer, empty_database: str, tokens: dict[str, str], files: dict[str, str]
) -> None:
    await asyncio.to_thread(run, app, "migrate", PHALANX_DATABASE_URL=empty_database)
    result = await asyncio.to_thread(run, app, "migrate", PHALANX_DATABASE_URL=empty_database, **files)
    assert result.exit_code == 0
    with pytest.raises(Problem, match="not one of this server's"):
        await role_of(empty_database, tokens[ADMIN])


async def test_without_files_the_first_tokens_are_made_and_printed(app: Typer, empty_database: str) -> None:
    result = await asyncio.to_thread(run, app, "migrate", PHALANX_DATABASE_URL=empty_database)
    assert result.exit_code == 0 and result.output.count("phx_") == 2


@pytest.mark.parametrize("text", ["", "sesame", f"phx_{'0' * 32}_short", f"phx_{'x' * 32}_{'a' * 43}"])
def test_a_file_without_a_strong_token_is_refused_by_name(app: Typer, files: dict[str, str], text: str) -> None:
    Path(files[CLUSTER]).write_text(text)
    result = run(app, "migrate", PHALANX_DATABASE_URL="postgresql://nobody@/x", **files)
    assert result.exit_code == 2 and CLUSTER in result.output
    assert not text or text not in result.output


def test_one_of_the_two_is_not_enough(app: Typer, files: dict[str, str]) -> None:
    del files[CLUSTER]
    result = run(app, "migrate", PHALANX_DATABASE_URL="postgresql://nobody@/x", **files)
    assert result.exit_code == 2 and f"{CLUSTER} is not set" in result.output


def test_a_missing_file_is_one_line(app: Typer, files: dict[str, str]) -> None:
    result = run(app, "migrate", PHALANX_DATABASE_URL="postgresql://nobody@/x", **files | {ADMIN: "/nowhere"})
    assert result.exit_code == 2 and "/nowhere" in result.output and "Traceback" not in result.output


def test_new_tokens_have_the_form_that_migrate_takes(app: Typer) -> None:
    printed = run(app, "new-token").output.strip()
    assert given(printed).text == printed
