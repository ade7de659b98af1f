"""The command that waits for jobs to end: wait."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli import describe, options, output
from phalanx.cli.failures import DONE, FAILED, INTERRUPTED
from phalanx.cli.session import connected, is_array, job_or_array_id
from phalanx.errors import WaitTimeout
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
    timeout_s = math.inf if timeout is None else options.span("--timeout", timeout).total_seconds()
    ended: list[Ended] = []
    with connected() as client:
        ids = [job_or_array_id(client, word) for word in jobs]
        try:
            for one in _each(client, ids, timeout_s):
                ended.append(one)
                if output_as is output.Format.TABLE:
                    typer.echo(_line(one))
        except KeyboardInterrupt:
            said = "stopped waiting; what has not ended goes on. See it with: phalanx show"
            typer.echo(f"{said} {ids[0] if len(ids) == 1 else 'JOB'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:  # what has ended is said, whatever became of the rest
            if output_as is not output.Format.TABLE:
                output.data([one.raw for one in ended], output_as)
    raise typer.Exit(DONE if all(_succeeded(one) for one in ended) else FAILED)


def _each(client: Client, ids: list[str], timeout_s: float) -> Iterator[Ended]:
    """In the order they were given: each as soon as it, and those before it, have ended. WaitTimeout after `timeout_s`
    seconds for all of them."""
    until = time.monotonic() + timeout_s
    for id_ in ids:
        wait = client.wait_array if is_array(id_) else client.wait
        left_s = max(0.0, until - time.monotonic())
        try:
            yield wait(id_, timeout_s=left_s)
        except WaitTimeout as late:
            raise WaitTimeout(late.still, timeout_s) from None


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
