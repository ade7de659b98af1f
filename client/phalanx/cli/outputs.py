"""The command that lists and fetches what jobs leave: outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli import output
from phalanx.cli.failures import INVALID, NOT_FOUND, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import JobArgument, connected, job_id

if TYPE_CHECKING:
    from phalanx.models import Job
    from phalanx.outputs import Fetched

COLUMNS = (
    Column("PATH", lambda one: one.path),
    Column("BYTES", lambda one: f"{one.bytes:,}", right=True),
    Column("ATTEMPT", lambda one: one.attempt, right=True),
    Column("GROUP", lambda one: one.group_rank, right=True),
    Column("SHA-256", lambda one: one.sha256[:12]),
    Column("COLLECTED", lambda one: output.ago(one.created_at)),
)


def outputs(
    job: JobArgument,
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="[PATTERN]…", help="Only these, like '*.pt' or 'logs/**'.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Fetch them into this directory.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt instead of the newest.")] = None,
    group: Annotated[int | None, typer.Option(min=0, help="Only of this group, a node of the job.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List the files that a job left, or fetch them. They are collected when its ranks have ended."""
    from phalanx.outputs import chosen  # with httpx, which takes a tenth of a second to import

    wanted = {"patterns": patterns or (), "group_rank": group}
    with connected() as client:
        found = job_id(client, job)
        listed = list(client.outputs(found, attempt=attempt))
        fitting = chosen(listed, every_group=True, **wanted)
        if not fitting and (patterns or group is not None):
            raise CommandError(f"no output of {found} fits; `phalanx outputs {found}` lists all", exit_code=NOT_FOUND)
        if to is None:
            if not fitting and output_as is output.Format.TABLE:
                return typer.echo(_none_left(client.job(found)), err=True)
            return output.items(fitting, COLUMNS, output_as, empty="")
        if to.exists() and not to.is_dir():
            raise CommandError(f"{to} is not a directory", exit_code=INVALID)
        fetched = client.download_outputs(found, to, attempt=attempt, **wanted)
    _say(fetched, to, output_as, passed_over=len(fitting) - len(fetched))


def _none_left(job: Job) -> str:
    """What to say of a job without outputs: whether there may still be some, and how a job leaves any."""
    yet = "has left no outputs" if job.ended else f"is {job.state}: outputs are collected when its ranks have ended"
    patterns = (job.spec.get("run") or {}).get("outputs")
    named = f"fits {', '.join(patterns)}" if patterns else "fits run.outputs of the job file, such as out/**"
    return (
        f"{job.name} {yet}. Kept is what ranks write into $PHALANX_OUTPUT_DIR, and of their workdir what {named}."
        f" Checkpoints are not among them: phalanx show {job.id}"
    )


def _say(fetched: list[Fetched], to: Path, output_as: output.Format, *, passed_over: int) -> None:
    if output_as is output.Format.TABLE:
        fresh = [one for one in fetched if one.fresh]
        size = sum(one.output.bytes for one in fresh)
        there = f", {len(fetched) - len(fresh)} were there" if len(fresh) < len(fetched) else ""
        typer.echo(f"{_files(len(fresh))} ({size:,} bytes) fetched into {to}{there}")
    else:
        output.data([_record(one) for one in fetched], output_as)
    if passed_over:
        typer.echo(f"{_files(passed_over)} of other groups have the same paths: --group N fetches those", err=True)


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _record(one: Fetched) -> dict[str, Any]:
    return {**one.output.raw, "file": str(one.file), "fresh": one.fresh}


def register(app: typer.Typer) -> None:
    app.command()(outputs)
