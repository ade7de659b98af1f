"""The command that waits for jobs to end: wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli import describe, options, output
from phalanx.cli.failures import DONE, FAILED, INTERRUPTED
from phalanx.cli.session import connected, is_array, job_or_array_id
from phalanx.models import ArrayStatus, Job

if TYPE_CHECKING:
    from phalanx.client import Client

Ended = Job | ArrayStatus


def wait(
    jobs: Annotated[
        list[str], typer.Argument(metavar="JOB|ARRAY…", help="Jobs by id, its beginning, name or @last; arrays by id.")
    ],
    timeout: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Wait at most so long in all, such as 90s or 2h.")
    ] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Wait until jobs, or all jobs of arrays, have ended.

    The exit code is 0 if all have succeeded, and 1 if one has not or --timeout is over first. Ctrl-C stops waiting and
    leaves the jobs running.
    """
    timeout_s = None if timeout is None else options.span("--timeout", timeout).total_seconds()
    with connected() as client:
        ids = [job_or_array_id(client, word) for word in jobs]
        try:
            ended = _wait(client, ids, timeout_s, output_as)
        except KeyboardInterrupt:
            said = "stopped waiting; what has not ended goes on. See it with: phalanx show"
            typer.echo(f"{said} {ids[0] if len(ids) == 1 else 'JOB'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
    if output_as is not output.Format.TABLE:
        output.data([one.raw for one in ended], output_as)
    raise typer.Exit(DONE if all(_succeeded(one) for one in ended) else FAILED)


def _wait(client: Client, ids: list[str], timeout_s: float | None, output_as: output.Format) -> list[Ended]:
    """In the order they were given: each line stands as soon as its job, and those before it, have ended."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    ended: list[Ended] = []
    for id_ in ids:
        left_s = None if until is None else max(0.0, until - time.monotonic())
        wait = client.wait_array if is_array(id_) else client.wait
        ended.append(wait(id_, timeout_s=left_s))
        if output_as is output.Format.TABLE:
            typer.echo(_line(ended[-1]))
    return ended


def _line(found: Ended) -> str:
    if isinstance(found, ArrayStatus):
        return f"{found.name} {found.id}: {found.doing}"
    why = f": {found.message}" if found.message and not _succeeded(found) else ""
    return f"{found.name} {found.id} {describe.state(found)}{why}"


def _succeeded(found: Ended) -> bool:
    if isinstance(found, ArrayStatus):
        return found.states.get("succeeded") == found.size
    return found.state == "succeeded"


def register(app: typer.Typer) -> None:
    app.command()(wait)
