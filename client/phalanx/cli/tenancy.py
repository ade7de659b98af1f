"""Commands about tenants and their quotas."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from phalanx.cli import output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import connected
from phalanx.models import Quota, Tenant

UNLIMITED = "none"

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's path, such as research/nlp.")]
Limit = Annotated[str | None, typer.Option(metavar="GPUS|none", help="GPUs; `none` lifts the limit.")]

tenants = typer.Typer(help="List tenants, create one, or change what one may do.", invoke_without_command=True)
quota = typer.Typer(help="Show or change a tenant's quotas.", invoke_without_command=True)


def _usage(tenant: Tenant) -> str:
    kinds = sorted(set(tenant.quotas) | set(tenant.usage))
    return ", ".join(f"{kind} {tenant.usage.get(kind, 0)}/{_nominal(tenant.quotas.get(kind))}" for kind in kinds)


def _nominal(held: Quota | None) -> str:
    return "–" if held is None else str(held.nominal)


TENANT_COLUMNS = (
    Column("PATH", lambda tenant: tenant.path),
    Column("WEIGHT", lambda tenant: f"{tenant.weight:g}", right=True),
    Column("IN USE / NOMINAL", _usage),
    Column("ID", lambda tenant: tenant.id),
)


@tenants.callback()
def tenants_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_tenants(output_as)


@tenants.command("list")
def list_tenants(output_as: output.Output = output.Format.TABLE) -> None:
    """List the tenants that you can see."""
    with connected() as client:
        output.items(client.tenants(), TENANT_COLUMNS, output_as, empty="no tenants")


@tenants.command("create")
def create_tenant(
    path: TenantArgument,
    weight: Annotated[float | None, typer.Option(min=0, help="Share among its siblings.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Create a tenant under its parent."""
    with connected() as client:
        made = client.create_tenant(path, weight=weight)
    if output_as is not output.Format.TABLE:
        return output.data(made.raw, output_as)
    typer.echo(f"{made.path} is created; give it GPUs with: phalanx quota set {made.path} GPU_TYPE --nominal N")


@tenants.command("show")
def show_tenant(path: TenantArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show a tenant: its weight, whom its jobs may evict, and what it uses of its quotas."""
    with connected() as client:
        _print_tenant(client.tenant(path), output_as)


@tenants.command("set")
def set_tenant(
    path: TenantArgument,
    weight: Annotated[float | None, typer.Option(min=0, help="Share of what can be borrowed.")] = None,
    within_tenant: Annotated[
        str | None, typer.Option(metavar="never|lower_priority|lower_or_newer_equal", help="Whom of its own it evicts.")
    ] = None,
    reclaim: Annotated[
        str | None, typer.Option(metavar="never|lower_priority|any", help="Whom it evicts to get its own quota back.")
    ] = None,
    borrow: Annotated[
        str | None,
        typer.Option(metavar="PRIORITY|none", help="Evict in order to borrow, up to this priority; none: never."),
    ] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Change a tenant's weight, or whom its jobs may evict; what is not given stays."""
    rules: dict[str, Any] = {}
    for name, given in (("within_tenant", within_tenant), ("reclaim", reclaim)):
        if given is not None:
            rules[name] = given
    if borrow is not None:
        rules["borrow"] = None if borrow == UNLIMITED else {"max_priority": _priority(borrow)}
    if weight is None and not rules:
        said = "nothing to change: give --weight, --within-tenant, --reclaim or --borrow"
        raise CommandError(said, exit_code=INVALID)
    with connected() as client:
        _print_tenant(client.change_tenant(path, weight=weight, preemption=rules or None), output_as)


def _priority(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise CommandError(
            f"--borrow is {given!r}: expected a priority as a number, or none", exit_code=INVALID
        ) from None


def _print_tenant(tenant: Tenant, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(tenant.raw, output_as)
    rules = {"within_tenant": "lower_priority", "reclaim": "any", "borrow": None} | tenant.preemption
    borrow = rules["borrow"]
    output.fields(
        [
            ("tenant", f"{tenant.path}  {tenant.id}"),
            ("weight", f"{tenant.weight:g}"),
            ("evicts of its own", rules["within_tenant"]),
            ("evicts to reclaim", rules["reclaim"]),
            ("evicts to borrow", f"up to priority {borrow['max_priority']}" if borrow else "never"),
            ("in use / nominal", _usage(tenant)),
        ]
    )


@quota.callback()
def quota_help(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@quota.command("show")
def show_quota(path: TenantArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show what a tenant owns, may borrow and lends, and what it uses."""
    with connected() as client:
        tenant = client.tenant(path)
    _print(tenant, output_as)


@quota.command("set")
def set_quota(
    path: TenantArgument,
    gpu_type: Annotated[str, typer.Argument(metavar="GPU_TYPE", help="Such as h100.")],
    nominal: Annotated[int | None, typer.Option(min=0, help="GPUs that it owns.")] = None,
    borrowing_limit: Limit = None,
    lending_limit: Limit = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Change a tenant's quota for one GPU type; what is not given stays."""
    limits: dict[str, int | None] = {} if nominal is None else {"nominal": nominal}
    for name, given in (("borrowing_limit", borrowing_limit), ("lending_limit", lending_limit)):
        if given is not None:
            limits[name] = _gpus(name, given)
    if not limits:
        raise CommandError("nothing to change: give --nominal, --borrowing-limit or --lending-limit", exit_code=INVALID)
    with connected() as client:
        client.quota_set(path, gpu_type, **limits)
        tenant = client.tenant(path)
    _print(tenant, output_as)


@quota.command("unset")
def unset_quota(
    path: TenantArgument,
    gpu_type: Annotated[str, typer.Argument(metavar="GPU_TYPE", help="Such as h100.")],
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Take away a tenant's quota for one GPU type."""
    with connected() as client:
        client.quota_unset(path, gpu_type)
        tenant = client.tenant(path)
    _print(tenant, output_as)


def _gpus(name: str, given: str) -> int | None:
    if given == UNLIMITED:
        return None
    if not given.isdecimal():
        raise CommandError(
            f"--{name.replace('_', '-')} is {given!r}: expected a number of GPUs, or none", exit_code=INVALID
        )
    return int(given)


def _print(tenant: Tenant, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data({"path": tenant.path, "quotas": tenant.raw.get("quotas"), "usage": tenant.usage}, output_as)
    columns = (
        Column("GPU TYPE", lambda row: row[0]),
        Column("IN USE", lambda row: tenant.usage.get(row[0], 0), right=True),
        Column("NOMINAL", lambda row: row[1].nominal, right=True),
        Column("MAY BORROW", lambda row: _limit(row[1].borrowing_limit), right=True),
        Column("MAY LEND", lambda row: _limit(row[1].lending_limit), right=True),
    )
    if tenant.quotas:
        output.console().print(output.table(sorted(tenant.quotas.items()), columns))
    else:
        typer.echo(f"{tenant.path} has no quotas", err=True)


def _limit(gpus: int | None) -> str:
    return "no limit" if gpus is None else str(gpus)


def register(app: typer.Typer) -> None:
    app.add_typer(tenants, name="tenants")
    app.add_typer(quota, name="quota")
