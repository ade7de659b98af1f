"""What is said about a job when it has ended: how it went from submit to the first step, what the loss did, where the
ranks ran, what is kept, and where to look further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phalanx.cli import chart, describe, output
from phalanx.errors import PhalanxError
from phalanx.models import Job, Series
from phalanx.units import duration_text

if TYPE_CHECKING:
    from phalanx.client import Client

BAR_WIDTH = 32
TAIL_LINES = 20


def print_summary(client: Client, job: Job) -> None:
    """The summary on stdout; of a job that failed also the end of what the failed rank wrote to stderr."""
    console = output.console()
    console.print(_headline(job))
    if table := _phases(job):
        console.print(table)
    output.fields(_facts(job, _loss(client, job)))
    if job.state != "succeeded":
        _print_failure(client, job)
    console.print(_look_further(job))


def _headline(job: Job) -> Any:
    from rich.text import Text

    mark = {"succeeded": "✔", "failed": "✘"}.get(job.state, "■") if output.unicode_output() else "*"
    took = (
        f" in {duration_text((job.finished_at - job.received_at).total_seconds())}"
        if job.finished_at and job.received_at
        else ""
    )
    style = output.STATE_STYLES.get(job.state, "")
    return Text.assemble((f"{mark} {job.name} {describe.state(job)}{took}", f"bold {style}"), (f"  {job.id}", "dim"))


def _phases(job: Job) -> Any:
    """The way to the first step, phase by phase: milliseconds, and a bar of each one's share."""
    from rich.table import Table

    found = describe.reached(job.phases)
    if not found or job.phases is None:
        return None
    total_s = sum(seconds for _, seconds in found)
    title = f"{describe.start_of(job.phases)} → first step"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    for name, seconds in found:
        table.add_row(f"  {name}", _milliseconds(seconds), _bar(seconds / total_s if total_s else 0.0))
    table.add_row("  total", _milliseconds(total_s), "", style="bold")
    return table


def _bar(share: float) -> str:
    return ("█" if output.unicode_output() else "#") * round(share * BAR_WIDTH)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _loss(client: Client, job: Job) -> Series | None:
    """The series of the loss. A summary without it is still one, so failures are not errors here."""
    try:
        return next((one for one in client.metrics(job.id, names=["loss"]) if one.points), None)
    except PhalanxError:
        return None


def _facts(job: Job, loss: Series | None) -> Sequence[tuple[str, str | None]]:
    speed = [said for said in describe.values(job.progress) if not said.startswith("loss")]
    done = describe.step(job.progress)
    return [
        ("message", job.message if job.state != "succeeded" else None),
        ("loss", _loss_line(loss) if loss else None),
        ("steps", "  ".join([done, *speed]) if done else None),
        ("ran on", "\n".join(describe.places(job.attempt))),
        ("ranks", describe.warmth(job.attempt)),
        ("attempts", str(job.attempts) if job.attempts > 1 else None),
        ("checkpoint", describe.checkpoint(job.checkpoint)),
    ]


def _loss_line(loss: Series) -> str:
    first, last = loss.points[0].mean, loss.points[-1].mean
    curve = chart.sparkline(chart.finite([p.mean for p in loss.points]), unicode=output.unicode_output())
    return f"{output.number(first)} → {output.number(last)}  {curve}"


def _print_failure(client: Client, job: Job) -> None:
    failed = describe.first_failure(job.attempt)
    console = output.console(stderr=True)
    if failed is None:
        return
    console.print(f"rank {failed.rank} {describe.ending(failed)}", markup=False, style="red")
    tail = failed.tail or _stderr_of(client, job, failed.rank)
    for line in tail.splitlines()[-TAIL_LINES:]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _stderr_of(client: Client, job: Job, rank: int) -> str:
    try:
        return client.logs(job.id, rank=rank, stream="stderr", tail_lines=TAIL_LINES)
    except PhalanxError:
        return ""


def _look_further(job: Job) -> Any:
    from rich.text import Text

    commands = [f"  phalanx {command} {job.id}" for command in ("logs", "metrics", "events", "show")]
    return Text("look further\n", style="bold").append("\n".join(commands), style="not bold")
