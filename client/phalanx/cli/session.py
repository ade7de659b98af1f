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

ArrayOrJobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB|ARRAY",
        help="A job by its id, the beginning of one, a name, or @last (submitted here last); or an array by its id.",
    ),
]

ARRAY_ID = re.compile(r"array_[0-9a-f]{32}")
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
    word = _last(client) if word == "@last" else word
    if FULL_ID.fullmatch(word):
        return word
    if ARRAY_ID.fullmatch(word):
        raise CommandError(
            f"{word} is an array: name one of its jobs (`phalanx jobs --array {word}` lists them)", exit_code=INVALID
        )
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


def job_or_array_id(client: Client, word: str) -> str:
    """The id of the job, or of the array, that `word` means."""
    word = _last(client) if word == "@last" else word
    return word if ARRAY_ID.fullmatch(word) else job_id(client, word)


def is_array(found: str) -> bool:
    """Whether an id is that of an array."""
    return ARRAY_ID.fullmatch(found) is not None


def _last(client: Client) -> str:
    remembered = config.last_job(client.url)
    if remembered is None:
        raise CommandError(f"no job was submitted from here to {client.url} yet; give an id", exit_code=NOT_FOUND)
    return remembered
