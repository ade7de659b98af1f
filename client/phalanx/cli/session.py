"""What commands share: the connection, and which job a word on the command line means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx import config
from phalanx.cli.failures import INVALID, NOT_FOUND, CommandError

if TYPE_CHECKING:
    from phalanx.client import AsyncClient, Client

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job id, the beginning of one, a name, or @last (submitted here last).")
]

FULL_ID = re.compile(r"job_[0-9a-f]{32}")
RECENT_JOBS = 500
SHOWN_MATCHES = 5


def make_client(url: str | None = None, token: str | None = None) -> Client:
    from phalanx.client import Client  # httpx takes a tenth of a second to import

    return Client(url, token)


def make_async_client() -> AsyncClient:
    from phalanx.client import AsyncClient

    return AsyncClient()


@contextmanager
def connected() -> Iterator[Client]:
    with make_client() as client:
        yield client


def job_id(client: Client, word: str) -> str:
    """The id that `word` means; CommandError where none or several jobs fit."""
    if FULL_ID.fullmatch(word):
        return word
    if word == "@last":
        return _last(client)
    if word.startswith("job_"):
        recent = client.jobs(limit=RECENT_JOBS)
        found = [job.id for _, job in zip(range(RECENT_JOBS), recent, strict=False) if job.id.startswith(word)]
    else:
        found = [job.id for _, job in zip(range(SHOWN_MATCHES + 1), client.jobs(name=word), strict=False)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise CommandError(f"there is no job {word!r} that you can see; `phalanx jobs` lists them", exit_code=NOT_FOUND)
    several = ", ".join(found[:SHOWN_MATCHES]) + (", …" if len(found) > SHOWN_MATCHES else "")
    raise CommandError(f"{word!r} means several jobs: {several}; give one id", exit_code=INVALID)


def _last(client: Client) -> str:
    remembered = config.last_job(client.url)
    if remembered is None:
        raise CommandError(f"no job was submitted from here to {client.url} yet; give an id", exit_code=NOT_FOUND)
    return remembered
