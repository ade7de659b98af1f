"""The command submit: from a job file, or a command after `--`, to an accepted job, and with --follow to its end."""

from __future__ import annotations

import asyncio
import re
import shlex
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from phalanx import config, jobfile, requirements
from phalanx.cli import describe, failures, output, session
from phalanx.cli.failures import FAILED, INTERRUPTED, INVALID, CommandError
from phalanx.errors import InvalidRequest
from phalanx.jobfile import JobFile
from phalanx.models import ArrayStatus, DryRun, Job, Memory

if TYPE_CHECKING:
    from phalanx.client import Client

AFTER_DASHES = "phalanx.after_dashes"


class CommandAfterDashes(TyperCommand):
    """Keeps what stands after `--` apart, so that `submit -- python train.py` does not take `python` for a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[AFTER_DASHES] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND…]"]


def submit(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A job file, YAML or JSON.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant that it counts for.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas: the gang, all at once or none.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs; with --replicas: of each replica.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any field: resources.replicas=4.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="Set a variable.")] = None,
    after: Annotated[
        list[str] | None, typer.Option(metavar="JOB|ARRAY", help="Start once this has succeeded; repeatable.")
    ] = None,
    after_any: Annotated[
        list[str] | None, typer.Option(metavar="JOB|ARRAY", help="Start once this has ended, however; repeatable.")
    ] = None,
    array: Annotated[
        str | None, typer.Option(metavar="INDICES", help="Make a job of each index: 0-99, 0,3,7-9 or 0-20:5.")
    ] = None,
    max_running: Annotated[int | None, typer.Option(min=1, help="So many jobs of the array run at once.")] = None,
    workdir: Annotated[Path | None, typer.Option(help="Directory to upload, instead of the file's.")] = None,
    no_upload: Annotated[bool, typer.Option("--no-upload", help="Upload no directory.")] = False,
    key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Submitting again with the same key makes no second job.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and say what would happen.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow it to its end.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Submit a job: `phalanx submit job.yaml`, or `phalanx submit --gpus 2 -- python train.py`.

    With --follow the exit code is 1 unless the job succeeds; Ctrl-C stops following and leaves the job running.
    """
    job = _job(file, ctx.meta[AFTER_DASHES])
    for field, value in (("name", name), ("tenant", tenant)):
        if value is not None:
            jobfile.put(job.document, [field], value)
    _resize(job.document, replicas=replicas, gpus=gpus)
    for text in env or []:
        jobfile.put(job.document, ["run", "env", (pair := _variable(text))[0]], pair[1])
    for field, value in (("indices", array), ("max_running", max_running)):
        if value is not None:
            jobfile.put(job.document, ["array", field], value)
    job = replace(job, document=jobfile.override(job.document, set_ or []))
    directory = None if no_upload else workdir or job.workdir()
    document = _as_sent(job)
    with session.connected() as client:
        for kind, words in (("ok", after), ("any", after_any)):
            if words:
                found = [session.job_or_array_id(client, word) for word in words]
                jobfile.put(document, ["after", kind], found)
        try:
            if dry_run:
                return _print_dry_run(client.dry_run(document), output_as)
            accepted = client.submit(document, workdir=directory, idempotency_key=key)
        except InvalidRequest as error:
            raise CommandError(placed(error, job), exit_code=INVALID) from None
        config.remember_job(client.url, accepted.array.id if accepted.array else accepted.id)
        _print_warnings(accepted.warnings)
        if follow:
            follow_it = _follow_array if accepted.array else _follow
            raise typer.Exit(follow_it(client, accepted, output_as))
    _print_accepted(accepted, output_as)


# ------------------------------------------------------------------ the document


def _job(file: Path | None, command: list[str]) -> JobFile:
    """The job of a file, of a command, or of a file whose command is replaced."""
    if file is None and not command:
        raise CommandError("nothing to submit: give a job file, or a command after --", exit_code=INVALID)
    if file is None:
        document = {"name": _name_of(command), "resources": {"gpus": 1}, "run": {"workdir": "."}}
        job = JobFile(document)
    else:
        job = jobfile.read(file)
    if command:
        jobfile.put(job.document, ["run", "command"], shlex.join(command))
    return job


def _name_of(command: list[str]) -> str:
    """A name for a job that has none: of the script, else of the program."""
    script = next((word for word in command if word.endswith(".py")), command[0])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(script).stem).strip("-._")
    return name[:128] or "job"


def _resize(document: dict[str, Any], *, replicas: int | None, gpus: int | None) -> None:
    """Alone, --gpus is the job file's short form: so many one-GPU replicas. With --replicas it is of each replica."""
    if replicas is None and gpus is None:
        return
    resources = document.setdefault("resources", {})
    if not isinstance(resources, dict):
        raise CommandError(f"resources is {resources!r}: expected fields like gpus", exit_code=INVALID)
    if replicas is None:
        for field in ("replicas", "gpus_per_replica"):
            resources.pop(field, None)
        return jobfile.put(document, ["resources", "gpus"], gpus)
    if "gpus" in resources:
        del resources["gpus"]
        resources["gpus_per_replica"] = 1
    resources["replicas"] = replicas
    if gpus is not None:
        resources["gpus_per_replica"] = gpus


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise CommandError(f"--env is {text!r}: expected NAME=VALUE", exit_code=INVALID)
    return name, value


def _as_sent(job: JobFile) -> dict[str, Any]:
    """The document without what is this machine's business: the directory, and the name of a requirements file."""
    document = requirements.filled_in(job.document, base=job.directory(), place=job.place(requirements.FIELD))
    run = document.get("run")
    if not isinstance(run, dict):
        return document
    return {**document, "run": {key: value for key, value in run.items() if key != "workdir"}}


def placed(error: InvalidRequest, job: JobFile) -> str:
    """The server's complaints, each with its place in the job file."""
    said = [f"{place}: {one}" if (place := job.place(one.field)) else str(one) for one in error.errors]
    return "; ".join(said) or failures.sentence(error)


# ------------------------------------------------------------------ what is said


def _print_dry_run(found: DryRun, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    would = found.would
    if would is None or (not would.start and would.hold is None):
        typer.echo("valid")
    elif would.start:
        typer.echo("valid; it would start now")
    elif would.hold and would.hold.reason == "impossible":
        typer.echo(f"valid, but it {would.hold.message or 'can never start'} [impossible]")
    elif would.hold:
        start = f"; expected to start {output.ago(would.hold.estimated_start)}" if would.hold.estimated_start else ""
        typer.echo(f"valid; it would wait: {would.hold.message or would.hold.reason} [{would.hold.reason}]{start}")
    if found.memory:
        _print_memory(found.memory)
    _print_warnings(found.warnings)


def _print_memory(memory: Memory) -> None:
    gib = {name: f"{size / (1 << 30):.3g}" for name, size in memory.parts_bytes.items() if size}
    parts = ", ".join(f"{name} {size}" for name, size in gib.items())
    typer.echo(f"memory of each rank: {memory.total_bytes / (1 << 30):.3g} GiB ({parts})")
    for each in memory.on:
        typer.echo(f"  {each.message}")


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _print_accepted(job: Job, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(job.raw, output_as)
    if job.array is not None:
        typer.echo(job.array.id)
        name = job.name.rpartition("[")[0]
        typer.echo(f"{name} is {job.array.size} jobs; see them with: phalanx jobs --array {job.array.id}", err=True)
        return
    typer.echo(job.id)
    waits_for = describe.hold(job)
    typer.echo(f"{job.name} is {waits_for or job.state}; follow it with: phalanx logs -f {job.id}", err=True)


def _follow(client: Client, job: Job, output_as: output.Format) -> int:
    """Follow to the end and sum up; the exit code."""
    from phalanx.cli import board, summary  # drawing is not needed to submit

    try:
        # closing: Ctrl-C may come before the loop runs
        with board.board() as shown, closing(_followed(job.id, shown)) as following:
            ended = asyncio.run(following)
    except KeyboardInterrupt:
        typer.echo(
            f"stopped following; {job.name} goes on. See it with: phalanx show {job.id}; end it with: "
            f"phalanx cancel {job.id}",
            err=True,
        )
        return INTERRUPTED
    if output_as is output.Format.TABLE:
        summary.print_summary(client, ended)
    else:
        output.data(ended.raw, output_as)
    return 0 if ended.state == "succeeded" else FAILED


def _follow_array(client: Client, job: Job, output_as: output.Format) -> int:
    """Say how many jobs of an array are in which state whenever that changes, until all have ended; the exit code."""
    assert job.array is not None
    name, told = job.name.rpartition("[")[0], ""

    def tell(found: ArrayStatus) -> None:
        nonlocal told
        if found.doing != told:
            told = found.doing
            typer.echo(f"{name} {found.id}: {told}", err=True)

    try:
        ended = client.wait_array(job.array.id, told=tell)
    except KeyboardInterrupt:
        typer.echo(
            f"stopped following; {name} goes on. See it with: phalanx show {job.array.id}; end it with: "
            f"phalanx cancel {job.array.id}",
            err=True,
        )
        return INTERRUPTED
    if output_as is output.Format.TABLE:
        typer.echo(f"{name} {ended.id}: {ended.doing}")
    else:
        output.data(ended.raw, output_as)
    return 0 if ended.states.get("succeeded") == ended.size else FAILED


async def _followed(job_id: str, shown: Any) -> Job:
    from phalanx.cli.follow import follow

    async with session.make_async_client() as client:
        return await follow(client, job_id, shown)


def register(app: typer.Typer) -> None:
    app.command(cls=CommandAfterDashes)(submit)
