"""Commands that act on a job, or on all jobs of an array: cancel, hold, release, requeue, priority."""

from __future__ import annotations

from typing import Annotated

import typer

from phalanx.cli import output
from phalanx.cli.session import ArrayOrJobArgument, connected, is_array, job_or_array_id
from phalanx.models import ArrayStatus, Job


def cancel(
    job: ArrayOrJobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """End a job, or all jobs of an array: SIGTERM, its grace time, then SIGKILL."""
    changed: Job | ArrayStatus
    with connected() as client:
        if is_array(found := job_or_array_id(client, job)):
            changed = client.cancel_array(found)
            changed = client.wait_array(found) if wait else changed
        else:
            changed = client.cancel(found)
            changed = client.wait(found) if wait else changed
    _print(changed, "cancelled" if changed.ended else "is being cancelled", output_as)


def hold(job: ArrayOrJobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Keep a queued job, or those of an array, from starting."""
    with connected() as client:
        found = job_or_array_id(client, job)
        changed = client.hold_array(found) if is_array(found) else client.hold(found)
    _print(changed, "is held; `phalanx release` lets it start", output_as)


def release(job: ArrayOrJobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Let a held job, or those of an array, start."""
    with connected() as client:
        found = job_or_array_id(client, job)
        changed = client.release_array(found) if is_array(found) else client.release(found)
    _print(changed, "is released", output_as)


def requeue(job: ArrayOrJobArgument, output_as: output.Output = output.Format.TABLE) -> None:
    """Put a running job, or those of an array, back into the queue.

    Its attempt is ended as by cancel, and the job goes on from its last checkpoint when it is its turn. No retry is
    used up.
    """
    with connected() as client:
        found = job_or_array_id(client, job)
        changed = client.requeue_array(found) if is_array(found) else client.requeue(found)
    _print(changed, "goes back into the queue", output_as)


def priority(
    job: ArrayOrJobArgument,
    to: Annotated[str, typer.Argument(metavar="PRIORITY", help="low, normal, high, urgent, or a number.")],
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Change the priority of a job, or of those of an array, that wait or run. For one below 0 write `-- -5`."""
    wanted: str | int = int(to) if to.removeprefix("-").isdecimal() else to
    with connected() as client:
        found = job_or_array_id(client, job)
        if is_array(found):
            return _print(client.set_array_priority(found, wanted), f"has priority {to}", output_as)
        changed = client.set_priority(found, wanted)
    _print(changed, f"has priority {changed.priority}", output_as)


def _print(changed: Job | ArrayStatus, said: str, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.data(changed.raw, output_as)
    states = f" ({changed.doing})" if isinstance(changed, ArrayStatus) else ""
    typer.echo(f"{changed.name} {changed.id} {said}{states}")


def register(app: typer.Typer) -> None:
    for command in (cancel, hold, release, requeue, priority):
        app.command()(command)
