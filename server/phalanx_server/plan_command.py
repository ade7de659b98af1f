"""Owns `phalanx plan FILE…`: snapshots in, one plan per line out. Needs no server.

Refuses to decide anything: the plans are those of `scheduling.planner`, the very ones that a live pass makes.
"""

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from phalanx_server.scheduling.plan import Plan, dump_plan
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.snapshot import parse_snapshot

INVALID_INPUT = 2


class Output(StrEnum):
    """How plans are printed: JSON Lines, one table per plan, or YAML documents."""

    JSON = "json"
    TABLE = "table"
    YAML = "yaml"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Snapshots as JSON files; - is standard input.")],
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print the plans.")] = Output.JSON,
) -> None:
    """Print what the scheduler decides about each snapshot, in the same order."""
    for file in files:
        _print(_plan_of(file), output, name=file)


def _plan_of(file: str) -> Plan:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return schedule(parse_snapshot(json.loads(text)))
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError:
        problem = "not UTF-8 text"
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:
        problem = str(error)
    except RecursionError:
        problem = "not a snapshot: nested too deeply"
    typer.echo(f"phalanx plan: {file}: {problem}", err=True)
    raise typer.Exit(INVALID_INPUT)


def _print(made: Plan, output: Output, *, name: str) -> None:
    document = dump_plan(made)
    if output is Output.JSON:
        typer.echo(json.dumps(document, ensure_ascii=False))
    elif output is Output.YAML:
        typer.echo("---\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)
    else:
        Console().print(_table(document, name))


def _table(document: dict[str, Any], name: str) -> Table:
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for column in ("JOB", "DECISION", "WHERE OR WHY"):
        table.add_column(column, overflow="fold")
    for row in _rows(document):
        table.add_row(*row)
    return table


def _rows(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for start in document["starts"]:
        yield start["job"], "start", _where(start)
    for eviction in document["preemptions"]:
        yield eviction["job"], "stop", f"{eviction['reason']}, for {eviction['for']}"
    for resize in document["resizes"]:
        yield resize["job"], "resize", _where(resize)
    for move in document["migrations"]:
        yield move["job"], "move", _where(move)
    for hold in document["holds"]:
        yield hold["job"], f"hold: {hold['reason']}", hold["message"]


def _where(decision: dict[str, Any]) -> str:
    return ", ".join(f"{p['replicas']} on {p['node']}" for p in decision["placement"])
