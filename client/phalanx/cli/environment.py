"""Commands about registered environments: create, list, show, delete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli import output
from phalanx.cli.failures import INVALID, NOT_FOUND, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import connected
from phalanx.environments import Environment

if TYPE_CHECKING:
    from phalanx.client import Client

FULL_ID = re.compile(r"env_[0-9a-f]{32}")

COLUMNS = (
    Column("NAME", lambda environment: environment.name),
    Column("TENANT", lambda environment: environment.tenant),
    Column("REQUIREMENTS", lambda environment: len(environment.requirements), right=True),
    Column("CREATED", lambda environment: output.ago(environment.created_at)),
    Column("BY", lambda environment: environment.created_by),
    Column("ID", lambda environment: environment.id),
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name, or an id.")]
Tenant = Annotated[str | None, typer.Option(help="The tenant that it is registered for.")]

environment = typer.Typer(help="Register packages under a name, for jobs to use.", invoke_without_command=True)


@environment.callback()
def environments_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_environments(output_as=output_as)


@environment.command("create")
def create_environment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs will call it.")],
    requirements: Annotated[Path, typer.Option(metavar="FILE", help="A requirements file, as pip has them.")],
    tenant: Tenant = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Register an environment. It never changes: other packages need another name."""
    with connected() as client:
        made = client.create_environment(name, requirements, tenant=tenant)
    if output_as is not output.Format.TABLE:
        return output.data(made.raw, output_as)
    typer.echo(
        f"{made.name} is registered for {made.tenant}, with {_count(made)}; "
        f"jobs use it as run.environment: {{name: {made.name}}}"
    )


@environment.command("list")
def list_environments(
    tenant: Annotated[str | None, typer.Option(help="What this tenant sees.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List the environments that you can see: your tenant's, those below it, and those that it inherits."""
    with connected() as client:
        output.items(client.environments(tenant=tenant), COLUMNS, output_as, empty="no environments")


@environment.command("show")
def show_environment(name: NameArgument, tenant: Tenant = None, output_as: output.Output = output.Format.TABLE) -> None:
    """Show one environment with its requirements."""
    with connected() as client:
        found = _found(client, name, tenant)
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    output.fields(
        [
            ("environment", f"{found.name}  {found.id}"),
            ("tenant", f"{found.tenant}  (by {found.created_by})"),
            ("created", output.local(found.created_at)),
            ("requirements", "\n".join(found.requirements)),
        ]
    )


@environment.command("delete")
def delete_environment(
    name: NameArgument, tenant: Tenant = None, output_as: output.Output = output.Format.TABLE
) -> None:
    """Delete an environment. Jobs that used it keep their copy of its requirements."""
    with connected() as client:
        found = _found(client, name, tenant)
        client.delete_environment(found.id)
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    typer.echo(f"{found.name} of {found.tenant} is deleted; jobs that used it keep their copy of its requirements")


def _found(client: Client, name: str, tenant: str | None) -> Environment:
    """The environment that `name` means; CommandError where none or several tenants have one."""
    if FULL_ID.fullmatch(name):
        return client.environment(name)
    found = [one for one in client.environments(name=name) if tenant in (None, one.tenant)]
    if len(found) == 1:
        return found[0]
    if not found:
        where = f" in {tenant}" if tenant else ""
        said = f"there is no environment {name!r}{where} that you can see; `phalanx environment list` lists them"
        raise CommandError(said, exit_code=NOT_FOUND)
    owners = ", ".join(one.tenant for one in found)
    raise CommandError(f"{name!r} is registered for several tenants: {owners}; say which: --tenant", exit_code=INVALID)


def _count(found: Environment) -> str:
    count = len(found.requirements)
    return f"{count} requirement{'' if count == 1 else 's'}"


def register(app: typer.Typer) -> None:
    app.add_typer(environment, name="environment")
