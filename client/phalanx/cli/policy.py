"""Commands about the policy of the scheduler."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from phalanx import jobfile
from phalanx.cli import output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import connected
from phalanx.models import Policy

policy = typer.Typer(help="Show or change the policy of the scheduler.", invoke_without_command=True)

Settings = Annotated[
    list[str],
    typer.Argument(metavar="FIELD=VALUE…", help="Such as fair_sharing=true or topology_levels='[block, rack]'."),
]

COLUMNS = (
    Column("FIELD", lambda row: row[0]),
    Column("VALUE", lambda row: row[1]),
    Column("FROM", lambda row: row[2]),
)


@policy.callback()
def policy_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        get(output_as)


@policy.command("get")
def get(output_as: output.Output = output.Format.TABLE) -> None:
    """Show the policy that is in force."""
    with connected() as client:
        _print(client.policy(), output_as)


@policy.command("set")
def set_fields(settings: Settings, output_as: output.Output = output.Format.TABLE) -> None:
    """Change fields of the policy; the others stay. The next pass follows it."""
    given = jobfile.override({}, settings)
    with connected() as client:
        _print(client.policy_set(given), output_as)


@policy.command("unset")
def unset_fields(
    fields: Annotated[list[str], typer.Argument(metavar="FIELD…", help="Such as fair_sharing.")],
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Take back what was set: these fields are as in the scheduler's settings file again, or have their defaults."""
    with connected() as client:
        unknown = set(fields) - client.policy().policy.keys()
        if unknown:
            raise CommandError(f"the policy has no field {min(unknown)}; see: phalanx policy get", exit_code=INVALID)
        _print(client.policy_set({}, unset=fields), output_as)


def _print(found: Policy, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    rows = [
        (name, _shown(value), "set" if name in found.settings else "file or default")
        for name, value in sorted(found.policy.items())
    ]
    output.console().print(output.table(rows, COLUMNS))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def register(app: typer.Typer) -> None:
    app.add_typer(policy, name="policy")
