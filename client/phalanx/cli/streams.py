"""Commands that print what a job prints and measures: logs, metrics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Annotated

import typer

from phalanx.cli import chart, describe, output
from phalanx.cli.failures import INVALID, CommandError
from phalanx.cli.output import Column
from phalanx.cli.session import JobArgument, connected, job_id
from phalanx.models import Job, LogLine, Point, Progress, Series

SPARKLINE_WIDTH = 32
CHART_POINTS = 500


def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", "-r", min=0, help="Only of this rank.")] = None,
    stream: Annotated[str | None, typer.Option(help="Only stdout, or only stderr.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Of this attempt instead of the latest.")] = None,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, help="Only the last lines.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Print what a job wrote."""
    with connected() as client:
        found = job_id(client, job)
        if follow:
            named = rank is None and client.job(found).ranks > 1
            lines = client.follow_logs(found, rank=rank, stream=stream, attempt=attempt, tail_lines=tail)
            return _follow_logs(lines, output_as, named=named)
        if tail is None:
            pieces = client.iter_logs(found, rank=rank, stream=stream, attempt=attempt)
        else:
            pieces = [client.logs(found, rank=rank, stream=stream, attempt=attempt, tail_lines=tail)]
        if output_as is not output.Format.TABLE:
            return output.data({"job_id": found, "text": "".join(pieces)}, output_as)
        written = [sys.stdout.write(piece) for piece in pieces]
        if not any(written):
            _tell_of_silence(client.job(found))


def _tell_of_silence(job: Job) -> None:
    """Beside the log, which is empty: whether anything is to come, and what became of the job."""
    said = f"{job.state}: {job.message}" if job.message else job.state
    output.console(stderr=True).print(f"nothing was printed ({said})", style="dim", markup=False)


def _follow_logs(lines: Iterable[LogLine], output_as: output.Format, *, named: bool) -> None:
    if output_as is not output.Format.TABLE:
        for line in lines:
            output.record(line.raw, output_as)
        return
    printer = LogPrinter(lambda text: print(text, flush=True), named=named)
    for line in lines:
        printer.take(line)
    printer.flush()


class LogPrinter:
    """Whole lines from pieces of many streams; `named` puts its rank before each."""

    def __init__(self, write: Callable[[str], None], *, named: bool) -> None:
        self._write, self._named = write, named
        self._open: dict[tuple[int, int, str], str] = {}

    def take(self, piece: LogLine) -> None:
        key = piece.attempt, piece.rank, piece.stream
        *whole, self._open[key] = (self._open.get(key, "") + piece.text).split("\n")
        for line in whole:
            self._line(piece.rank, line)

    def flush(self) -> None:
        for (_, rank, _), rest in self._open.items():
            if rest:
                self._line(rank, rest)
        self._open.clear()

    def _line(self, rank: int, line: str) -> None:
        self._write(f"[{rank}] {line}" if self._named else line)


# ------------------------------------------------------------------ metrics


def metrics(
    job: JobArgument,
    name: Annotated[list[str] | None, typer.Option("--name", "-m", help="Only this metric; may be repeated.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what is reported until the job ends.")] = False,
    since: Annotated[datetime | None, typer.Option("--from", help="From this time on.")] = None,
    until: Annotated[datetime | None, typer.Option("--to", help="Up to this time.")] = None,
    output_as: output.Output = output.Format.TABLE,
) -> None:
    """Show what a job measured: a line for each metric, or a chart of those named."""
    if follow and (since or until):
        raise CommandError("--from and --to say what to show of the past: leave out --follow", exit_code=INVALID)
    with connected() as client:
        found = job_id(client, job)
        if follow:
            for report in client.follow_metrics(found, names=name or ()):
                _print_report(report, output_as)
            return
        window = {"start": since and since.astimezone(), "end": until and until.astimezone()}
        series = client.metrics(found, names=name or (), max_points=CHART_POINTS, **window)
    if output_as is not output.Format.TABLE or not name:
        return output.items(series, SERIES_COLUMNS, output_as, empty="the job has reported no metrics")
    for one in series:
        _print_chart(one)


def _means(series: Series) -> list[float]:
    return chart.finite([point.mean for point in series.points])


def _edge(series: Series, pick: Callable[[list[Point]], Point]) -> str | None:
    return output.number(pick(series.points).mean) if series.points else None


def _extreme(series: Series, name: str, pick: Callable[..., float]) -> str | None:
    found = chart.finite([getattr(point, name) for point in series.points])
    return output.number(pick(found)) if found else None


def _sparkline(series: Series) -> str:
    return chart.sparkline(_means(series), width=SPARKLINE_WIDTH, unicode=output.unicode_output())


SERIES_COLUMNS = (
    Column("METRIC", lambda series: series.name),
    Column("FIRST", lambda series: _edge(series, lambda points: points[0]), right=True),
    Column("LAST", lambda series: _edge(series, lambda points: points[-1]), right=True),
    Column("MIN", lambda series: _extreme(series, "min", min), right=True),
    Column("MAX", lambda series: _extreme(series, "max", max), right=True),
    Column("POINTS", lambda series: sum(point.count for point in series.points), right=True),
    Column("", _sparkline),
)


def _print_chart(series: Series) -> None:
    values = _means(series)
    if not values:
        typer.echo(f"{series.name}: nothing to draw", err=True)
        return
    first, last = series.points[0], series.points[-1]
    steps = f", step {first.step}–{last.step}" if first.step is not None and last.step is not None else ""
    span_s = math.ceil((last.at - first.at).total_seconds())
    typer.echo(f"{series.name}: {output.number(first.mean)} → {output.number(last.mean)} in {span_s} s{steps}")
    for line in chart.chart(values, unicode=output.unicode_output()):
        typer.echo(line)


def _print_report(report: Progress, output_as: output.Format) -> None:
    if output_as is not output.Format.TABLE:
        return output.record(report.raw, output_as)
    said = "  ".join(f"{name} {output.number(value)}" for name, value in report.values.items() if name != "step")
    print(f"step {describe.step(report) or '–'}  {said}", flush=True)


def register(app: typer.Typer) -> None:
    for command in (logs, metrics):
        app.command()(command)
