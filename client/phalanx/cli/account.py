"""Commands about who one is: login, whoami, tokens, version."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer

from phalanx import config
from phalanx.cli import output, session
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.models import Whoami

DEFAULT_URL = "http://127.0.0.1:8321"  # where `phalanx up` listens

TOKEN_COLUMNS = (
    Column("ID", lambda token: token.id),
    Column("NAME", lambda token: token.name),
    Column("ROLE", lambda token: token.role),
    Column("SCOPE", lambda token: token.tenant or token.cluster),
    Column("CREATED", lambda token: output.ago(token.created_at)),
    Column("EXPIRES", lambda token: output.ago(token.expires_at) or "never"),
    Column("REVOKED", lambda token: output.ago(token.revoked_at)),
)

tokens = typer.Typer(help="List, make and revoke API tokens.", invoke_without_command=True)


def installed_version() -> str:
    return f"phalanx {version_of('phalanx')}"


def version() -> None:
    """Print the version."""
    typer.echo(installed_version())


def login(
    address: Annotated[str | None, typer.Argument(metavar="[URL]", help="The server.")] = None,
    url: Annotated[str | None, typer.Option(help="The server, as an option.")] = None,
    token: Annotated[str | None, typer.Option(help="The token; others can see it in the process list.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="A file that holds the token; - reads stdin.")] = None,
) -> None:
    """Check a token with a server and store both for later commands (mode 0600). Asks for what is not given."""
    chosen = config.checked_url(address or url or typer.prompt("Server", default=DEFAULT_URL))
    secret = token or (_read_token(token_file) if token_file else typer.prompt("Token", hide_input=True)).strip()
    if not secret:
        raise CommandError("the token is empty: give the text that starts with phx_", exit_code=INVALID)
    with session.make_client(chosen, secret) as client:
        me = client.whoami()
    path = config.save(config.Login(chosen, secret))
    if chosen.startswith("http:") and not config.is_local(chosen):
        typer.echo(f"warning: {chosen} is not encrypted: others on the way can read the token", err=True)
    typer.echo(f"signed in to {chosen} as {_name(me)}; stored in {path}")


def _read_token(path: Path) -> str:
    try:
        return sys.stdin.readline() if str(path) == "-" else path.expanduser().read_text()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: the home of nobody
        raise CommandError(f"cannot read the token from {path}: {error}", exit_code=INVALID) from None


def whoami(output_as: output.Output = output.Format.TABLE) -> None:
    """Say who the server takes you for."""
    with session.connected() as client:
        me, url = client.whoami(), client.url
    if output_as is not output.Format.TABLE:
        return output.data(me.raw, output_as)
    expires = output.local(me.expires_at) or "never"
    output.fields(
        [("server", url), ("name", me.user or me.name), ("role", me.role), ("tenant", me.tenant), ("expires", expires)]
    )


def _name(me: Whoami) -> str:
    scope = f" of {me.tenant}" if me.tenant else ""
    return f"{me.user or me.name or 'a token'} ({me.role}{scope})"


@tokens.callback()
def list_by_default(ctx: typer.Context, output_as: output.Output = output.Format.TABLE) -> None:
    if ctx.invoked_subcommand is None:
        list_tokens(output_as)


@tokens.command("list")
def list_tokens(output_as: output.Output = output.Format.TABLE) -> None:
    """List tokens; their text is never shown again."""
    with session.connected() as client:
        output.items(client.tokens(), TOKEN_COLUMNS, output_as, empty="no tokens")


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    role: Annotated[str, typer.Option(help="admin, operator, manager, member or viewer.")] = "member",
    tenant: Annotated[str | None, typer.Option(help="The tenant that it is for.")] = None,
    user: Annotated[str | None, typer.Option(help="The person who holds it.")] = None,
    expires_in: Annotated[float | None, typer.Option(min=1, help="Seconds that it is good for.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Make a token. Its text is printed once."""
    with session.connected() as client:
        made = client.create_token(name, role=role, tenant=tenant, user=user, expires_in_s=expires_in)
    if output_as is not output.Format.TABLE:
        return output.data(made.raw, output_as)
    typer.echo(made.token)
    typer.echo(f"{made.id} ({made.role}): keep the text above, it is shown only now", err=True)


@tokens.command("revoke")
def revoke_token(token: Annotated[str, typer.Argument(metavar="TOKEN_ID")]) -> None:
    """End a token at once."""
    with session.connected() as client:
        client.revoke_token(token)
    typer.echo(f"{token} is revoked")


def register(app: typer.Typer) -> None:
    for command in (login, whoami, version):
        app.command()(command)
    app.add_typer(tokens, name="tokens")
