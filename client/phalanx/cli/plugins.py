"""Commands that other packages plug into `phalanx` (entry-point group `phalanx.commands`), and the group around them.

It owns when a plug-in is imported: only when its command is asked for, so that `phalanx jobs` never waits for
the server's or Ray's imports. For that the commands of our own packages are listed here, and stand in the help as
stand-ins; a test compares the list with what the packages register. Other plug-ins are imported for the help and for
names that nobody else knows.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from phalanx.cli import failures
from phalanx.errors import PhalanxError

PROGRAM = "phalanx"
MARKUP = "markdown"
GROUP = "phalanx.commands"
PANEL = "Running Phalanx"


@dataclass(frozen=True)
class Extra:
    """The commands of one of our packages. `probe` is a module that only its extra installs."""

    probe: str
    commands: dict[str, str]
    hidden: frozenset[str] = frozenset()


OURS = {
    "server": Extra(
        "fastapi",
        {
            "up": "Run all of Phalanx on this machine.",
            "server": "Run the API server.",
            "scheduler": "Run a scheduler; one of many leads.",
            "migrate": "Bring the database to this version.",
            "new-token": "Print a token for a first start.",
            "plan": "Compute plans, of the live cluster too.",
            "simulate": "Replay a trace through the scheduler.",
            "scaling": "Fit scaling laws to past runs.",
        },
        hidden=frozenset({"new-token"}),
    ),
    "worker": Extra(
        "ray",
        {"agent": "Run the agent of a Ray cluster.", "local-ray": "Run emulated Ray nodes on this machine."},
        hidden=frozenset({"local-ray"}),
    ),
}


def extra_of(command: str | None) -> str | None:
    """The extra that a command comes with."""
    return next((name for name, extra in OURS.items() if command in extra.commands), None)


def needs(command: str, extra: str, missing: str | None) -> str:
    what = f" ({missing} is not installed)" if missing else ""
    return f"phalanx {command} needs: pip install 'phalanx[{extra}]'{what}"


def load(entry: EntryPoint) -> dict[str, Any]:
    """Import a plug-in; its commands by name. ImportError where its extra is not installed."""
    app = typer.Typer(rich_markup_mode=MARKUP, add_completion=False)

    @app.callback()
    def plugged_in() -> None:
        """Makes the plug-in's app a group, however many commands it has."""

    entry.load()(app)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _stand_in(name: str, extra: str, help: str, *, hidden: bool) -> TyperCommand:
    if importlib.util.find_spec(OURS[extra].probe) is None:
        help = f"{help} (needs: pip install 'phalanx[{extra}]')"
    return TyperCommand(name, help=help, hidden=hidden, rich_help_panel=PANEL, rich_markup_mode=None)


class PhalanxGroup(TyperGroup):
    """The root command: imports plug-ins late, and ends every failure with one line and its exit code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for extra, declared in OURS.items():
            for name, help in declared.commands.items():
                self.add_command(_stand_in(name, extra, help, hidden=name in declared.hidden))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self._plug_in(args[0])
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        self._plug_in_others()
        return super().list_commands(ctx)

    def _plug_in(self, name: str) -> None:
        """Replace the stand-in for `name`, or look for it in other packages."""
        extra = extra_of(name)
        if extra is None:
            return None if name in self.commands else self._plug_in_others()
        entry = _entries().get(name)
        if entry is None:
            raise failures.CommandError(
                f"phalanx {name}: this installation does not have it; {needs(name, extra, None)}"
            )
        try:
            self.commands.update(load(entry))
        except ModuleNotFoundError as error:
            raise failures.CommandError(needs(name, extra, error.name)) from None

    def _plug_in_others(self) -> None:
        for entry in self._others():
            try:
                self.commands = {**load(entry), **self.commands}
            except Exception as error:
                print(f"phalanx: the plug-in {entry.value} cannot be loaded: {error}", file=sys.stderr)

    def _others(self) -> Iterator[EntryPoint]:
        return (entry for name, entry in _entries().items() if extra_of(name) is None)

    def main(self, args: Any = None, prog_name: str | None = None, standalone_mode: bool = True, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        try:
            outcome = super().main(words, PROGRAM, standalone_mode=False, **extra)
            code = outcome if isinstance(outcome, int) else failures.DONE
        except typer.exceptions.TyperException as error:
            code = _complain(_usage(error), failures.INVALID)
        except PhalanxError as error:
            code = _complain(failures.sentence(error), failures.exit_code(error))
        except typer.Abort:
            code = _complain("interrupted", failures.INTERRUPTED)
        except ModuleNotFoundError as error:
            owner = extra_of(words[0] if words else None)
            if owner is None:
                raise
            code = _complain(needs(words[0], owner, error.name), failures.FAILED)
        if standalone_mode:
            sys.exit(code)
        return code


def _usage(error: typer.exceptions.TyperException) -> str:
    said = " ".join(error.format_message().split()).rstrip(".")
    ctx = getattr(error, "ctx", None)
    return f"{said}; see `{ctx.command_path} --help`" if ctx is not None else said


def _complain(sentence: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr)
    return code
