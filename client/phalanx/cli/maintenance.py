"""Commands about maintenance windows: create, list, show, set, end, delete."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from phalanx.cli import options, output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import connected
from phalanx.maintenance import MaintenanceWindow


def _where(window: MaintenanceWindow) -> str:
    labels = [f"{key}={value}" for key, value in sorted(window.labels.items())]
    return ", ".join([*window.nodes, *([" ".join(labels)] if labels else [])])


COLUMNS = (
    Column("ID", lambda window: window.id),
    Column("STATE", lambda window: window.state, is_state=True),
    Column("STARTS", lambda window: output.local(window.starts_at)),
    Column("ENDS", lambda window: output.local(window.ends_at)),
    Column("WHERE", _where),
    Column("NODES", lambda window: window.covers, right=True),
    Column("REASON", lambda window: window.reason),
)

WindowArgument = Annotated[str, typer.Argument(metavar="ID", help="A window, as `phalanx maintenance` lists it.")]
Nodes = Annotated[list[str] | None, typer.Option("--node", metavar="NODE", help="A node by name or id; repeatable.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Nodes with all of these labels; repeatable.")
]
NoNodes = Annotated[bool, typer.Option("--no-nodes", help="Name no node any more: by labels alone.")]
NoLabels = Annotated[bool, typer.Option("--no-labels", help="No labels any more: the named nodes alone.")]
Start = Annotated[
    str | None, typer.Option(metavar="TIME|+DURATION", help="Such as 2026-11-21T00:00:00Z, or +2h from now.")
]
End = Annotated[str | None, typer.Option(metavar="TIME|+DURATION", help="The same; or use --for.")]
For = Annotated[str | None, typer.Option("--for", metavar="DURATION", help="How long from the start on, such as 90m.")]
Reason = Annotated[str | None, typer.Option(help="For people: every user may read it.")]

maintenance = typer.Typer(help="Plan when nodes are to be empty, list it, or end it.", invoke_without_command=True)


@maintenance.callback()
def windows_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_windows(output_as=output_as)


@maintenance.command("list")
def list_windows(
    over: Annotated[bool, typer.Option("--over", help="Those that are over, too.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List the windows that are planned or open."""
    with connected() as client:
        output.items(client.maintenance_windows(over=over), COLUMNS, output_as, empty="no maintenance is planned")


@maintenance.command("show")
def show_window(window: WindowArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show one window."""
    with connected() as client:
        _print(client.maintenance_window(window), output_as)


@maintenance.command("create")
def create_window(
    nodes: Annotated[list[str] | None, typer.Argument(metavar="[NODE]...", help="Nodes by name or id.")] = None,
    labels: Labels = None,
    start: Start = None,
    end: End = None,
    lasts: For = None,
    reason: Reason = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Keep nodes empty between two times. No job starts there that is not sure to end before; what still runs at the
    start is stopped and waits. Without --start it begins now."""
    if not nodes and not labels:
        raise CommandError("of which nodes? name them, or give --label KEY=VALUE", exit_code=INVALID)
    now = datetime.now(UTC)
    starts_at = options.time("--start", start, now) if start else now
    ends_at = _end(end, lasts, starts_at, now)
    if ends_at is None:
        raise CommandError("when does it end? give --end or --for", exit_code=INVALID)
    with connected() as client:
        made = client.create_maintenance(
            starts_at=starts_at, ends_at=ends_at, nodes=nodes or (), labels=options.labels(labels), reason=reason or ""
        )
        _print(made, output_as)


@maintenance.command("set")
def set_window(
    window: WindowArgument,
    nodes: Nodes = None,
    no_nodes: NoNodes = False,
    labels: Labels = None,
    no_labels: NoLabels = False,
    start: Start = None,
    end: End = None,
    lasts: For = None,
    reason: Reason = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Change a window that is not over; what is not given stays, and what is given replaces what was."""
    for what, given, none in (("node", nodes, no_nodes), ("label", labels, no_labels)):
        if given and none:
            raise CommandError(f"--{what} and --no-{what}s contradict each other: give one of them", exit_code=INVALID)
    now = datetime.now(UTC)
    with connected() as client:
        starts_at = options.time("--start", start, now) if start else None
        from_ = starts_at or (client.maintenance_window(window).starts_at if lasts else now)
        changes: dict[str, Any] = {
            "nodes": [] if no_nodes else nodes or None,
            "labels": {} if no_labels else options.labels(labels) or None,
            "starts_at": starts_at,
            "ends_at": _end(end, lasts, from_, now),
            "reason": reason,
        }
        if all(value is None for value in changes.values()):
            said = "nothing to change: give --node, --label, --start, --end, --for, --reason, --no-nodes or --no-labels"
            raise CommandError(said, exit_code=INVALID)
        _print(client.change_maintenance(window, **changes), output_as)


@maintenance.command("end")
def end_window(window: WindowArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """End an open window now: its nodes take work again."""
    with connected() as client:
        _print(client.end_maintenance(window), output_as)


@maintenance.command("delete")
def delete_window(window: WindowArgument) -> None:
    """Delete a window, also one that is open: its nodes take work again."""
    with connected() as client:
        client.delete_maintenance(window)
    typer.echo(f"{window} is deleted")


def _end(end: str | None, lasts: str | None, starts_at: datetime, now: datetime) -> datetime | None:
    if end and lasts:
        raise CommandError("--end and --for say the same: give one of them", exit_code=INVALID)
    if lasts:
        return options.after(starts_at, options.span("--for", lasts), f"--for is {lasts!r}")
    return options.time("--end", end, now) if end else None


def _print(window: MaintenanceWindow, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(window.raw, output_as)
    output.fields(
        [
            ("maintenance", window.id),
            ("state", window.state),
            ("starts", f"{output.local(window.starts_at)}  ({output.ago(window.starts_at)})"),
            ("ends", f"{output.local(window.ends_at)}  ({output.ago(window.ends_at)})"),
            ("where", _where(window)),
            ("nodes", window.covers),
            ("reason", window.reason),
            ("declared by", window.created_by),
        ]
    )


def register(app: typer.Typer) -> None:
    app.add_typer(maintenance, name="maintenance")
