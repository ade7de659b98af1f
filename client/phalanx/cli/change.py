"""Commands that act on a job: cancel, hold, release."""

from __future__ import annotations

from typing import Annotated

import typer

from phalanx.cli import output
from phalanx.cli.session import JobArgument, connected, job_id
from phalanx.models import Job


def cancel(
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """End a job: SIGTERM, its grace time, then SIGKILL."""
    with connected() as client:
        changed = client.cancel(job_id(client, job))
        changed = client.wait(changed.id) if wait else changed
    _print(changed, "cancelled" if changed.ended else "is being cancelled", output_as)


def hold(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Keep a queued job from starting."""
    with connected() as client:
        changed = client.hold(job_id(client, job))
    _print(changed, "is held; `phalanx release` lets it start", output_as)


def release(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Let a held job start."""
    with connected() as client:
        changed = client.release(job_id(client, job))
    _print(changed, "is released", output_as)


def _print(job: Job, said: str, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(job.raw, output_as)
    typer.echo(f"{job.name} {job.id} {said}")


def register(app: typer.Typer) -> None:
    for command in (cancel, hold, release):
        app.command()(command)
