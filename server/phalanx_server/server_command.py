"""`phalanx server`: one API process against the database of PHALANX_DATABASE_URL."""

import asyncio
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from phalanx_server.actions.bootstrap import CLUSTER, bootstrap
from phalanx_server.main import serve
from phalanx_server.settings import Settings
from phalanx_server.store import migrate
from phalanx_server.store.engine import create_engine

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
    asyncio.run(check_database(settings.required_database_url, upgrade=migrate_first))
    serve(settings)


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


async def check_database(url: str, *, upgrade: bool) -> None:
    """Exit with one clear line unless the database can be reached and has the schema of this version."""
    try:
        if upgrade:
            await migrate.upgrade(url)
            await first_run(url)
        revision = await migrate.current(url)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise _stop(UNAVAILABLE, f"cannot use the database: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise _stop(USAGE, f"PHALANX_DATABASE_URL: {error}") from None
    if revision != migrate.HEAD:
        found = f"is at schema {revision}" if revision else "has never been migrated"
        needed = f"this version needs {migrate.HEAD}: run `phalanx server --migrate`"
        raise _stop(UNAVAILABLE, f"the database {found}; {needed}")


async def first_run(url: str) -> None:
    """In an empty database: make the first tokens and print them, this once."""
    engine = create_engine(url)
    try:
        made = await bootstrap(engine)
    finally:
        await engine.dispose()
    if made is not None:
        typer.echo(f"Admin token, shown only now: {made.admin_token}", err=True)
        typer.echo(f"Token of cluster `{CLUSTER}`, shown only now: {made.cluster_token}", err=True)


def _stop(code: int, message: str) -> typer.Exit:
    typer.echo(f"phalanx server: {message}", err=True)
    return typer.Exit(code)


def register(app: typer.Typer) -> None:
    app.command("server")(server)
