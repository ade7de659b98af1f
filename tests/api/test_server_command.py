"""`phalanx server` before it serves: the state of its database, and the first run."""

import pytest
import typer
from phalanx_server.server_command import check_database


async def test_an_empty_database_is_refused_with_what_to_do(empty_database, capsys):
    with pytest.raises(typer.Exit) as stopped:
        await check_database(empty_database, upgrade=False)
    assert stopped.value.exit_code == 6
    assert "phalanx server --migrate" in capsys.readouterr().err


async def test_the_first_migration_prints_the_first_tokens_and_the_second_none(empty_database, capsys):
    await check_database(empty_database, upgrade=True)
    assert capsys.readouterr().err.count("phx_") == 2
    await check_database(empty_database, upgrade=True)
    assert "phx_" not in capsys.readouterr().err
