"""Commands that look at jobs: jobs, show, explain, queue, events."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from phalanx.cli import describe, output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import JobArgument, connected, job_id
from phalanx.models import Event, Job

JOB_COLUMNS = (
    Column("ID", lambda job: job.id),
    Column("NAME", lambda job: job.name),
    Column("TENANT", lambda job: job.tenant),
    Column("STATE", lambda job: job.state, is_state=True),
    Column("GPUS", lambda job: job.gpus, right=True),
    Column("STEP", lambda job: describe.step(job.progress), right=True),
    Column("SUBMITTED", lambda job: output.ago(job.submitted_at)),
    Column("REASON", lambda job: job.hold.reason if job.hold else job.reason),
)

QUEUE_COLUMNS = (
    Column("POSITION", lambda item: item.position, right=True),
    Column("ID", lambda item: item.job_id),
    Column("NAME", lambda item: item.name),
    Column("TENANT", lambda item: item.tenant),
    Column("PRIORITY", lambda item: item.priority, right=True),
    Column("GPUS", lambda item: item.replicas * item.gpus_per_replica, right=True),
    Column("EXPECTED START", lambda item: output.ago(item.hold.estimated_start) if item.hold else None),
    Column("WAITS FOR", lambda item: (item.hold.message or item.hold.reason) if item.hold else None),
)

EVENT_COLUMNS = (
    Column("AT", lambda event: output.local(event.at)),
    Column("EVENT", lambda event: event.kind),
    Column("NODE", lambda event: event.node),
    Column("MESSAGE", lambda event: event.message),
)


def jobs(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", help="Only in this state; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only with this name.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="Only with this label.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List jobs, newest first."""
    labels = dict(_label(text) for text in label or [])
    with connected() as client:
        pages = client.jobs(tenant=tenant, state=state or (), name=name, labels=labels, limit=limit)
        output.items(islice(pages, limit), JOB_COLUMNS, output_as, empty="no jobs")
        if any(True for _ in pages):
            output.console(stderr=True).print(f"the newest {limit}; --limit shows more", style="dim")


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise CommandError(f"--label is {text!r}: expected KEY=VALUE", exit_code=INVALID)
    return key, value


def show(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show one job: what was asked, where it is, how it got there."""
    with connected() as client:
        found = client.job(job_id(client, job))
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    _print_job(found)


def _print_job(job: Job) -> None:
    run = job.spec.get("run") or {}
    attempt = job.attempt
    message = job.message or (attempt.message if attempt else None)
    output.fields(
        [
            ("job", f"{job.name}  {job.id}"),
            ("state", describe.state(job)),
            ("message", message),
            ("waits for", describe.hold(job)),
            ("stops", describe.gives_way(job)),
            ("tenant", f"{job.tenant}  (by {job.created_by}, priority {job.priority})"),
            ("asked", describe.asked(job)),
            ("command", run.get("command")),
            ("environment", describe.environment(job)),
            ("submitted", f"{output.local(job.submitted_at)} ({output.ago(job.submitted_at)})"),
            ("started", output.local(job.started_at)),
            ("finished", output.local(job.finished_at)),
            ("attempt", describe.attempt(job)),
            ("ran on", "\n".join(describe.places(attempt))),
            ("ranks", describe.warmth(attempt)),
            ("progress", describe.progress(job.progress)),
            ("checkpoint", describe.checkpoint(job.checkpoint)),
            ("first step", describe.phases(job.phases)),
            ("ended", "\n".join(describe.exits(attempt))),
            ("labels", " ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
        ]
    )


def explain(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Say why a job waits, what would unblock it, and when it is expected to start."""
    with connected() as client:
        found = client.explain(job_id(client, job))
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    typer.echo(found.text or f"the job is {found.state}")


def queue(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, first in line first.")] = 20,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List waiting jobs in their order, with what each waits for."""
    with connected() as client:
        pages = client.queue(tenant=tenant, limit=limit)
        output.items(islice(pages, limit), QUEUE_COLUMNS, output_as, empty="nothing waits")


def events(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List what happened to a job."""
    with connected() as client:
        found = job_id(client, job)
        if not follow:
            return output.items(client.events(found), EVENT_COLUMNS, output_as, empty="no events")
        for event in client.follow(found):
            _print_event(event, output_as)


def _print_event(event: Event, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.record(event.raw, output_as)
    where = f" [{event.node}]" if event.node else ""
    print(f"{output.local(event.at)}  {event.kind:<16}{where} {event.message}", flush=True)


def register(app: typer.Typer) -> None:
    for command in (jobs, show, explain, queue, events):
        app.command()(command)
