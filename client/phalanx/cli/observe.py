"""Commands that look at jobs: jobs, show, explain, queue, events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated

import typer

from phalanx.cli import describe, options, output
from phalanx.cli.output import Column
from phalanx.cli.session import ArrayOrJobArgument, JobArgument, connected, is_array, job_id, job_or_array_id
from phalanx.models import ArrayStatus, Event, Job, QueueItem

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

QUEUE_READ_MAX, QUEUE_PAGE = 2000, 200


@dataclass(frozen=True)
class QueueLine:
    """Waiting jobs that are shown as one: the first, and the last of those behind it in its array."""

    first: QueueItem
    last: QueueItem
    jobs: int = 1

    def position(self) -> str:
        return f"{self.first.position}–{self.last.position}" if self.jobs > 1 else str(self.first.position)

    def name(self) -> str:
        if self.jobs == 1 or self.first.array is None or self.last.array is None:
            return self.first.name
        name = self.first.name.rpartition("[")[0]
        return f"{name}[{self.first.array.index}–{self.last.array.index}] ({self.jobs} jobs)"

    def id(self) -> str:
        return self.first.array.id if self.jobs > 1 and self.first.array else self.first.job_id


QUEUE_COLUMNS = (
    Column("POSITION", lambda line: line.position(), right=True),
    Column("ID", lambda line: line.id()),
    Column("NAME", lambda line: line.name()),
    Column("TENANT", lambda line: line.first.tenant),
    Column("PRIORITY", lambda line: line.first.priority, right=True),
    Column("GPUS", lambda line: line.jobs * line.first.replicas * line.first.gpus_per_replica, right=True),
    Column("EXPECTED START", lambda line: output.ago(line.first.hold.estimated_start) if line.first.hold else None),
    Column("WAITS FOR", lambda line: _waits_for(line.first)),
)


def _waits_for(item: QueueItem) -> str | None:
    return (item.hold.message or item.hold.reason) if item.hold else None


def _folded(items: Iterable[QueueItem]) -> Iterator[QueueLine]:
    """Jobs of one array that stand one behind the other and wait for the same as one line."""
    line: QueueLine | None = None
    for item in items:
        if line is not None and _is_next(line.last, item):
            line = replace(line, last=item, jobs=line.jobs + 1)
            continue
        if line is not None:
            yield line
        line = QueueLine(item, item)
    if line is not None:
        yield line


def _is_next(before: QueueItem, item: QueueItem) -> bool:
    if before.array is None or item.array is None or before.array.id != item.array.id:
        return False
    return _waits_for(before) == _waits_for(item)


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
    array: Annotated[str | None, typer.Option(metavar="ARRAY", help="Only the jobs of this array.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List jobs, newest first."""
    labels = options.labels(label)
    with connected() as client:
        pages = client.jobs(tenant=tenant, state=state or (), name=name, labels=labels, array=array, limit=limit)
        output.items(islice(pages, limit), JOB_COLUMNS, output_as, empty="no jobs")
        if any(True for _ in pages):
            output.console(stderr=True).print(f"the newest {limit}; --limit shows more", style="dim")


def show(job: ArrayOrJobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show one job: what was asked, where it is, how it got there; or how far the jobs of an array are."""
    with connected() as client:
        if is_array(name := job_or_array_id(client, job)):
            return _print_array(client.array(name), output_as)
        found = client.job(name)
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    _print_job(found)


def _print_array(found: ArrayStatus, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    at_once = f", {found.max_running} at once" if found.max_running else ""
    held = f" ({found.held} on hold)" if found.held else ""
    output.fields(
        [
            ("array", f"{found.name}  {found.id}"),
            ("jobs", f"{found.size}: {found.indices}{at_once}"),
            ("states", f"{found.doing}{held}"),
            ("tenant", f"{found.tenant}  (by {found.created_by})"),
            ("submitted", f"{output.local(found.submitted_at)} ({output.ago(found.submitted_at)})"),
        ]
    )
    typer.echo(f"its jobs: phalanx jobs --array {found.id}", err=True)


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
            ("warning", "\n".join(job.warnings)),
            ("stops", describe.gives_way(job)),
            ("tenant", f"{job.tenant}  (by {job.created_by}, priority {job.priority})"),
            ("asked", describe.asked(job)),
            ("array", describe.array(job)),
            ("after", describe.after(job)),
            ("deadline", output.local(describe.deadline(job))),
            ("command", run.get("command") or describe.recipe(run)),
            ("environment", describe.environment(job)),
            ("submitted", f"{output.local(job.submitted_at)} ({output.ago(job.submitted_at)})"),
            ("started", output.local(job.started_at)),
            ("finished", output.local(job.finished_at)),
            ("attempt", describe.attempt(job)),
            ("ran on", "\n".join(describe.places(attempt))),
            ("ranks", describe.warmth(attempt)),
            ("progress", describe.progress(job.progress)),
            ("speed", "\n".join(describe.speeds(job))),
            ("checkpoint", describe.checkpoint(job.checkpoint)),
            ("first step", describe.phases(job.phases)),
            ("ended", "\n".join(describe.exits(attempt))),
            ("labels", " ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))),
        ]
    )


def explain(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Say why a job waits, what would unblock it, and when it is expected to start; or how it ended."""
    with connected() as client:
        found = client.explain(job_id(client, job))
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    typer.echo(found.text or f"the job is {found.state}")


def goodput(job: JobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Show how much of the GPU time that a job was given went into steps that count, and where the rest went.

    Start, rendezvous and setup last until all ranks run, until their process group is up, and until the first step is
    done. Data wait and checkpoint: standing still for them. Rolled back and redone: steps that did not count in the
    end. Stopping: from the request to stop. Other: what none of these explains. A job that runs is counted until now.
    """
    with connected() as client:
        found = client.goodput(job_id(client, job))
    if output_as is not output.Format.TABLE:
        return output.data(found.raw, output_as)
    if found.goodput is None:
        return typer.echo("it was given no GPU time yet")
    said = "" if found.measured else " (at most: the job does not say itself how long its steps take)"
    if not any(found.parts_gpu_s.get(part) for part in ("productive", "redone", "rolled_back")):
        said = " (no step was seen: it reported none, and no torch optimizer took one)"
    hours, attempts = found.allocated_gpu_s / 3600, "attempt" if found.attempts == 1 else "attempts"
    typer.echo(f"goodput {found.goodput:.1%} of {hours:.2f} GPU-hours in {found.attempts} {attempts}{said}")
    output.fields(
        (part.replace("_", " "), f"{seconds / found.allocated_gpu_s:6.1%}  {seconds:,.1f} GPU-s")
        for part, seconds in found.parts_gpu_s.items()
        if seconds > 0
    )


def queue(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, first in line first.")] = 20,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """List waiting jobs in their order, with what each waits for; those of an array that wait for the same, one behind
    the other, on one line."""
    with connected() as client:
        if output_as is not output.Format.TABLE:
            return output.items(islice(client.queue(tenant=tenant, limit=limit), limit), (), output_as, empty="")
        items = client.queue(tenant=tenant, limit=max(limit, QUEUE_PAGE))
        lines = _folded(islice(items, QUEUE_READ_MAX))
        output.items(islice(lines, limit), QUEUE_COLUMNS, output_as, empty="nothing waits")


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
    for command in (jobs, show, explain, goodput, queue, events):
        app.command()(command)
