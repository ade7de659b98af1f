"""Owns `phalanx plan FILE…`: snapshots in, one plan per line out, without any server; and `phalanx plan --live`: what
the scheduler of a server would do, with jobs, quotas and drained nodes as asked.

Refuses to decide anything: the plans are those of `scheduling.planner`, the very ones that a live pass makes.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from phalanx_server.domain.reason import date_of
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
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE…", help="Snapshots as JSON files; - is standard input.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Ask the server what it would do next.")] = False,
    job: Annotated[list[Path] | None, typer.Option(help="--live: with this job file submitted; repeatable.")] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENANT:RESOURCE=N", help="--live: with this quota of a GPU type, cpu or memory_gib; repeatable."
        ),
    ] = None,
    drain: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="--live: with this node drained; repeatable.")
    ] = None,
    output: Annotated[
        Output | None, typer.Option("--output", "-o", help="How to print plans: json, or of --live table, by default.")
    ] = None,
) -> None:
    """Print what the scheduler decides about each snapshot, in the same order; or, with --live, what it would start,
    stop, resize, move and hold now if things were as asked."""
    if live == bool(files):
        raise typer.BadParameter("give snapshot files, or --live")
    if not live and (job or quota or drain):
        raise typer.BadParameter("--job, --quota and --drain go with --live")
    for file in files or ():
        _print(dump_plan(_plan_of(file)), output or Output.JSON, name=file)
    if live:
        _ask(job or [], dict_of_quotas(quota or []), drain or [], output or Output.TABLE)


def _ask(jobs: list[Path], quotas: dict[str, dict[str, Any]], drained: list[str], output: Output) -> None:
    from phalanx import jobfile  # plans of files need no client
    from phalanx.cli.session import connected

    with connected() as client:
        found = client.plan(
            jobs=[jobfile.read(path).document for path in jobs] or None,
            quotas=quotas or None,
            nodes=dict.fromkeys(drained, "draining") or None,
        )
    if output is Output.TABLE:
        asked = [*(f"{found.names.get(id_, id_)} submitted" for id_ in found.jobs)]
        asked += [
            f"{tenant} with {given['nominal']} {name}" for tenant in quotas for name, given in quotas[tenant].items()
        ]
        asked += [f"{node} drained" for node in drained]
        _print(found.plan, output, name=", ".join(asked) or "as things are", names=found.names)
    else:
        _print(found.plan, output, name="live")


def dict_of_quotas(given: list[str]) -> dict[str, dict[str, Any]]:
    """`TENANT:RESOURCE=N` as the API takes quotas. BadParameter where it is not that."""
    quotas: dict[str, dict[str, Any]] = {}
    for words in given:
        name, equals, number = words.partition("=")
        tenant, colon, resource = name.rpartition(":")
        if not (equals and colon and tenant and resource and number.isdecimal()):
            raise typer.BadParameter(f"--quota is {words!r}: expected TENANT:RESOURCE=N")
        quotas.setdefault(tenant, {})[resource] = {"nominal": int(number)}
    return quotas


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


def _print(document: dict[str, Any], output: Output, *, name: str, names: Mapping[str, str] | None = None) -> None:
    if output is Output.JSON:
        typer.echo(json.dumps(document, ensure_ascii=False))
    elif output is Output.YAML:
        typer.echo("---\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)
    else:
        Console().print(_table(document, name, names or {}))


def _table(document: dict[str, Any], name: str, names: Mapping[str, str]) -> Table:
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for column in ("JOB", "DECISION", "WHERE OR WHY"):
        table.add_column(column, overflow="fold")
    for row in _rows(document, lambda id_: names.get(id_, id_)):
        table.add_row(*row)
    return table


def _rows(document: dict[str, Any], named: Callable[[str], str]) -> Iterator[tuple[str, str, str]]:
    for start in document["starts"]:
        yield named(start["job"]), "start", _where(start, named)
    for eviction in document["preemptions"]:
        why = f"{eviction['reason']}{_for_whom(eviction, named)}, losing {eviction['lost_gpu_s']:.0f} GPU-seconds"
        yield named(eviction["job"]), "stop", why
    for resize in document["resizes"]:
        what = f"to {resize['replicas']} replicas: {_where(resize, named)}{_for_whom(resize, named)}"
        yield named(resize["job"]), "resize", what
    for move in document["migrations"]:
        yield named(move["job"]), "move", f"{_where(move, named)}{_for_whom(move, named)}"
    for hold in document["holds"]:
        at = hold["estimated_start"]
        expected = f"; expected to start at {date_of(at):%Y-%m-%dT%H:%M:%SZ}" if at is not None else ""
        yield named(hold["job"]), f"hold: {hold['reason']}", hold["message"] + expected


def _for_whom(decision: dict[str, Any], named: Callable[[str], str]) -> str:
    return f", for {named(decision['for'])}" if decision["for"] else ""


def _where(decision: dict[str, Any], named: Callable[[str], str]) -> str:
    return ", ".join(f"{p['replicas']} on {named(p['node'])}" for p in decision["placement"])
