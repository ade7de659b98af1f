"""Puts the command line together: the root command, and which module brings which command."""

from __future__ import annotations

from typing import Annotated

import typer

from phalanx.cli import (
    account,
    change,
    environment,
    failures,
    fleet,
    maintenance,
    observe,
    outputs,
    plugins,
    policy,
    profile,
    streams,
    submit,
    tenancy,
    wait,
)

HELP = f"""Submit distributed training jobs to a GPU cluster, and see what becomes of them.

{failures.EXIT_CODES}
"""

app = typer.Typer(
    cls=plugins.PhalanxGroup,
    help=HELP,
    rich_markup_mode=plugins.MARKUP,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(account.installed_version())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


OF_JOBS = (submit, observe, streams, outputs, profile, wait, change)
for module in (*OF_JOBS, environment, fleet, maintenance, tenancy, policy, account):
    module.register(app)
