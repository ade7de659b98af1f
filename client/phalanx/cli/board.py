"""How a followed job looks: a live display on a terminal, sparse plain lines anywhere else.

Both write to stderr, so that stdout holds the result alone. Rates and the time left come from `Pace`, which is pure.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from phalanx.cli import describe, output
from phalanx.models import Job, Progress

if TYPE_CHECKING:
    from phalanx.cli.follow import Board

PACE_WINDOW_S = 60.0
LINE_EVERY_S = 2.0
BAR_WIDTH = 36


class Pace:
    """Steps per second over the last minute of reports, and the time left."""

    def __init__(self) -> None:
        self._reports: deque[tuple[float, int]] = deque()

    def take(self, progress: Progress | None) -> None:
        if progress is None or progress.step is None or progress.at is None:
            return
        at, step = progress.at.timestamp(), progress.step
        if self._reports and step < self._reports[-1][1]:
            self._reports.clear()  # a new attempt resumes from its checkpoint
        if not self._reports or at > self._reports[-1][0]:
            self._reports.append((at, step))
        while len(self._reports) > 2 and at - self._reports[0][0] > PACE_WINDOW_S:
            self._reports.popleft()

    def left_s(self, progress: Progress | None) -> float | None:
        """Seconds to the last step at the present pace; None while either is unknown."""
        if progress is None or not progress.total_steps or progress.step is None or len(self._reports) < 2:
            return None
        (first_at, first), (last_at, last) = self._reports[0], self._reports[-1]
        if last <= first or last_at <= first_at:
            return None
        return (progress.total_steps - progress.step) * (last_at - first_at) / (last - first)


@contextmanager
def board(*, live: bool | None = None) -> Iterator[Board]:
    """The board for this stderr."""
    console = output.console(stderr=True)
    if not (console.is_terminal if live is None else live):
        yield PlainBoard(lambda text: console.print(text, markup=False, soft_wrap=True))
        return
    shown = LiveBoard()
    from rich.live import Live

    with Live(get_renderable=shown.render, console=console, refresh_per_second=8, transient=True) as display:
        yield shown
        display.update("")


class PlainBoard:
    """A line for each change of state or of what is waited for; for progress at most one in LINE_EVERY_S."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._pace = Pace()
        self._headline = ""
        self._told: set[str] = set()
        self._progress: str | None = None
        self._written_at = float("-inf")

    def show(self, job: Job) -> None:
        self._pace.take(job.progress)
        headline = _headline(job)
        progress = _progress(job, self._pace) if job.state == "running" else None
        if headline != self._headline:
            self._line(f"{job.name} {job.id}: {headline}")
        elif progress and progress != self._progress and self._clock() - self._written_at >= LINE_EVERY_S:
            self._progress = progress
            self._line(f"{job.name} {progress}")
        self._headline = headline

    def note(self, text: str) -> None:
        if text != self._headline:
            self._line(text)
        self._headline = text

    def tell(self, text: str) -> None:
        """Something that happened; said once, however many nodes say it."""
        if text not in self._told:
            self._line(text)
        self._told.add(text)

    def _line(self, text: str) -> None:
        self._written_at = self._clock()
        self._write(text)


def _headline(job: Job) -> str:
    """What a plain reader is told when it changes: without the parts that always do (position, expected start)."""
    if job.state == "queued" and job.hold:
        told = f"; {last_end}" if (last_end := describe.last_end(job)) else ""
        return f"queued: {job.hold.message or job.hold.reason} [{job.hold.reason}]{told}"
    return describe.state(job)


def _progress(job: Job, pace: Pace) -> str | None:
    said = describe.progress(job.progress)
    left_s = pace.left_s(job.progress)
    return f"{said}  ETA {output.clock(left_s)}" if said and left_s is not None else said


class LiveBoard:
    """The live display: a headline with the state and the time, and below it what is waited for or how far it is."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        from rich.spinner import Spinner  # only a terminal needs it

        self._clock = clock
        self._began = clock()
        self._spinner = Spinner("dots")
        self._pace = Pace()
        self._job: Job | None = None
        self._note = ""
        self._told = ""

    def show(self, job: Job) -> None:
        self._pace.take(job.progress)
        self._job, self._note = job, ""

    def note(self, text: str) -> None:
        self._note = text

    def tell(self, text: str) -> None:
        """What happens on the way to the start."""
        self._told = text

    def render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        if self._job is None:
            return self._spinner
        lines: list[Any] = [self._first_line(self._job), *self._details(self._job)]
        if self._note:
            lines.append(Text(f"  {self._note}", style="yellow"))
        return Group(*lines)

    def _first_line(self, job: Job) -> Any:
        from rich.table import Table
        from rich.text import Text

        since = job.received_at.timestamp() if job.received_at else self._began
        grid = Table.grid(padding=(0, 1))
        state = Text(describe.state(job), style=output.STATE_STYLES.get(job.state, ""))
        spent = Text(output.clock(self._clock() - since), style="dim")
        grid.add_row(self._spinner, Text(job.name, style="bold"), Text(job.id, style="dim"), state, spent)
        return grid

    def _details(self, job: Job) -> list[Any]:
        from rich.text import Text

        if waits_for := describe.hold(job):
            unblocks = [f"  would unblock it: {what}" for what in (job.hold.unblocks if job.hold else [])[:3]]
            told = [Text(f"  {last_end}", style="yellow")] if (last_end := describe.last_end(job)) else []
            return [Text(f"  {waits_for}"), *told, *(Text(line, style="dim") for line in unblocks)]
        if job.state == "starting" and self._told:
            return [Text(f"  {self._told}", style="dim")]
        if job.state in ("running", "stopping"):
            return [self._progress_line(job)]
        return []

    def _progress_line(self, job: Job) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        progress = job.progress
        if progress is None or progress.step is None:
            return "  waiting for its first report"
        cells: list[Any] = [f"  step {describe.step(progress)}"]
        if progress.total_steps:
            cells.append(ProgressBar(total=progress.total_steps, completed=progress.step, width=BAR_WIDTH))
        left_s = self._pace.left_s(progress)
        cells += [*describe.values(progress), *([f"ETA {output.clock(left_s)}"] if left_s is not None else [])]
        grid = Table.grid(padding=(0, 2))
        grid.add_row(*cells)
        return grid
