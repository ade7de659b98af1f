"""Commands of other packages: found late, missing extras said in one line, the list of our own kept true."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from phalanx.cli import plugins
from phalanx.cli.app import app
from typer.testing import CliRunner, Result

OWN_MODULE = "phalanx_test_plugin"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes `source` the module behind the entry point `name`, and the only one."""

    def plug(name: str, source: str) -> None:
        (tmp_path / f"{OWN_MODULE}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, OWN_MODULE, raising=False)
        entry = EntryPoint(name, f"{OWN_MODULE}:register", plugins.GROUP)
        monkeypatch.setattr(plugins, "_entries", lambda: {name: entry})

    return plug


ONE_COMMAND = "def register(app):\n    @app.command()\n    def greet(name: str): print('hello', name)\n"


def test_the_list_of_our_commands_is_what_the_packages_register() -> None:
    entries = {entry.name: entry for entry in entry_points(group=plugins.GROUP)}
    declared = {name for extra in plugins.OURS.values() for name in extra.commands}
    assert set(entries) == declared
    hidden = {name for name, entry in entries.items() if plugins.load(entry)[name].hidden}
    assert hidden == {name for extra in plugins.OURS.values() for name in extra.hidden}


def test_help_lists_our_commands_without_importing_them(plugged) -> None:
    plugged("up", "raise AssertionError('imported for the help')")
    text = run("--help").stdout
    assert "scheduler" in text and "local-ray" not in text


def test_a_command_of_ours_is_imported_when_it_is_used(plugged) -> None:
    plugged("up", "def register(app):\n    @app.command()\n    def up(nodes: int = 1): print('up', nodes)\n")
    assert run("up", "--nodes", "2").stdout == "up 2\n"
    assert "--nodes" in run("up", "--help").stdout


def test_a_missing_extra_is_one_line_that_says_what_to_install(plugged) -> None:
    plugged("up", "import a_package_that_is_not_there")
    result = run("up")
    said = "error: phalanx up needs: pip install 'phalanx[server]' (a_package_that_is_not_there is not installed)\n"
    assert (result.exit_code, result.stderr) == (1, said)


def test_so_it_is_when_the_import_comes_late(plugged) -> None:
    plugged("agent", "def register(app):\n    @app.command()\n    def agent():\n        import ray_that_is_not_there\n")
    result = run("agent")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "pip install 'phalanx[worker]' (ray_that_is_not_there is not installed)" in result.stderr


def test_the_help_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "Run the API server. (needs: pip install 'phalanx[server]')" in text


def test_a_plug_in_of_others_is_found_and_listed(plugged) -> None:
    plugged("others", ONE_COMMAND)
    assert run("greet", "ada").stdout == "hello ada\n"
    assert "greet" in run("--help").stdout


def test_a_broken_plug_in_of_others_breaks_nothing_else(plugged) -> None:
    plugged("others", "1 / 0")
    result = run("--help")
    assert result.exit_code == 0
    assert result.stderr == f"phalanx: the plug-in {OWN_MODULE}:register cannot be loaded: division by zero\n"
