"""`phalanx server`: one API process against the database of PHALANX_DATABASE_URL.

And `phalanx migrate`: what `--migrate` does before serving, for those who do it once for many servers.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from phalanx_server.actions.bootstrap import CLUSTER, FirstTokens, bootstrap
from phalanx_server.main import serve
from phalanx_server.settings import Settings
from phalanx_server.store import migrate
from phalanx_server.store.engine import create_engine
from phalanx_server.store.tokens import Minted, given, mint

USAGE, UNAVAILABLE = 2, 6  # exit codes of the CLI


def server(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [env: PHALANX_HOST; 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [env: PHALANX_PORT; 8321]")] = None,
    migrate_first: Annotated[
        bool,
        typer.Option(
            "--migrate",
            help="First bring the database to this version; in an empty one, make and print the first tokens.",
        ),
    ] = False,
) -> None:
    """Serve the HTTP API, until Ctrl-C."""
    settings = read_settings(host=host, port=port)
    first = first_tokens(settings) if migrate_first else None
    asyncio.run(check_database(settings.required_database_url, upgrade=migrate_first, first=first))
    serve(settings)


def migrate_database() -> None:
    """Bring the database to this version, and end; in an empty one, make the first tokens and print them."""
    settings = read_settings(host=None, port=None)
    asyncio.run(check_database(settings.required_database_url, upgrade=True, first=first_tokens(settings)))


def new_token() -> None:
    """Print a token that no server knows yet, for PHALANX_BOOTSTRAP_ADMIN_TOKEN_FILE or ..._CLUSTER_TOKEN_FILE."""
    typer.echo(mint().text)


def first_tokens(settings: Settings) -> FirstTokens | None:
    """The first tokens that the installer made beforehand; None if it left that to us. Exits where a file is wrong."""
    admin, cluster = settings.bootstrap_admin_token_file, settings.bootstrap_cluster_token_file
    if admin is None and cluster is None:
        return None
    return FirstTokens(_given("ADMIN", admin), _given("CLUSTER", cluster))


def _given(whose: str, path: Path | None) -> Minted:
    variable = f"PHALANX_BOOTSTRAP_{whose}_TOKEN_FILE"
    if path is None:
        raise _stop(USAGE, f"{variable} is not set: the first tokens are given both or not at all")
    try:
        return given(path.read_text().strip())
    except (OSError, ValueError) as error:
        raise _stop(USAGE, f"{variable} ({path}): {error}") from None


def read_settings(*, host: str | None, port: int | None) -> Settings:
    """The settings of the environment, with what the command line says instead."""
    given: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        settings = Settings(**given)
        settings.required_database_url  # noqa: B018 - raises where there is none
    except ValidationError as error:
        raise _stop(USAGE, "; ".join(_sentence(problem) for problem in error.errors())) from None
    except ValueError as error:
        raise _stop(USAGE, str(error)) from None
    return settings


def _sentence(problem: object) -> str:
    assert isinstance(problem, dict)
    return f"PHALANX_{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}"


async def check_database(url: str, *, upgrade: bool, first: FirstTokens | None = None) -> None:
    """Exit with one clear line unless the database can be reached and has the schema of this version."""
    try:
        if upgrade:
            await migrate.upgrade(url)
            await first_run(url, first)
        revision = await migrate.current(url)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise _stop(UNAVAILABLE, f"cannot use the database: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise _stop(USAGE, f"PHALANX_DATABASE_URL: {error}") from None
    if revision != migrate.HEAD:
        found = f"is at schema {revision}" if revision else "has never been migrated"
        needed = f"this version needs {migrate.HEAD}: run `phalanx server --migrate`"
        raise _stop(UNAVAILABLE, f"the database {found}; {needed}")


async def first_run(url: str, first: FirstTokens | None) -> None:
    """In an empty database: make the first tokens and print them, this once. Those that were given are not printed."""
    engine = create_engine(url)
    try:
        made = await bootstrap(engine, first)
    finally:
        await engine.dispose()
    if made is not None and first is None:
        typer.echo(f"Admin token, shown only now: {made.admin_token}", err=True)
        typer.echo(f"Token of cluster `{CLUSTER}`, shown only now: {made.cluster_token}", err=True)


def _stop(code: int, message: str) -> typer.Exit:
    typer.echo(f"phalanx: {message}", err=True)
    return typer.Exit(code)


def register(app: typer.Typer) -> None:
    app.command("server")(server)


def register_migration(app: typer.Typer) -> None:
    app.command("migrate")(migrate_database)
    app.command("new-token", hidden=True)(new_token)
