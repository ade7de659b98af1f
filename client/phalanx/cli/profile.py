"""The command that records what a running job does: profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli import describe, output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.session import JobArgument, connected, job_id

if TYPE_CHECKING:
    from phalanx.profiles import Profile


def profile(
    job: JobArgument,
    steps: Annotated[int, typer.Option(min=1, max=100, help="How many optimizer steps to record.")] = 5,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--rank", min=0, help="Of this rank; repeatable. Absent: the first rank of each node."),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Fetch the traces into this directory.")] = Path(),
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Wait at most this many seconds.")] = 900.0,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Record a trace of a job while it runs, and fetch it. The job goes on; its script needs no change."""
    if to.exists() and not to.is_dir():
        raise CommandError(f"{to} is not a directory", exit_code=INVALID)
    say = _Progress()
    with connected() as client:
        found = job_id(client, job)
        made = client.request_profile(found, steps=steps, ranks=ranks or None)
        done = client.wait_profile(found, made.id, timeout_s=timeout_s, told=say)
        if done.state == "failed":
            raise CommandError(f"{done.id} of {found} failed: {done.reason}")
        files = client.download_traces(found, done, to)
    for rank in done.ranks:
        if rank.state == "failed":
            typer.echo(f"rank {rank.rank} has no trace: {rank.reason}", err=True)
    if output_as is not output.Format.TABLE:
        return output.data({**done.raw, "files": [str(file) for file in files]}, output_as)
    for file in files:
        typer.echo(file)
    typer.echo(f"open {'it' if len(files) == 1 else 'each'} at https://ui.perfetto.dev", err=True)


class _Progress:
    """Says how far a profile is, each time that it is further."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, profile: Profile) -> None:
        ranks = describe.span("rank", [rank.rank for rank in profile.ranks])
        steps = "1 step" if profile.steps == 1 else f"{profile.steps} steps"
        sentence = {
            "requested": f"{profile.id}: waiting for the next step of {ranks}",
            "recording": f"{profile.id}: recording {steps} of {ranks}",
        }.get(profile.state, "")
        if sentence and sentence != self._said:
            typer.echo(sentence, err=True)
            self._said = sentence


def register(app: typer.Typer) -> None:
    app.command()(profile)
