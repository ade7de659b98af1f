"""A study as tables for a terminal. It owns how the numbers read; it refuses to know where they come from."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phalanx_server.scaling.outlook import Forecast, Recommendation
from phalanx_server.scaling.study import Study
from phalanx_server.scaling.uncertainty import Interval

MEANINGS = {
    "E": "loss that no model gets below",
    "A": "size term A / N^alpha",
    "B": "token term B / D^beta",
    "alpha": "how fast the size term falls",
    "beta": "how fast the token term falls",
    "a": "best N grows as C^a, best D as C^(1-a)",
}


def show(found: Study, console: Console) -> None:
    """Print the law, the answers and the runs; then what to doubt."""
    console.print(_law(found))
    for part in _answers(found):
        console.print()
        console.print(part)
    if found.pace and (found.forecast or found.recommendation):
        console.print(Text(f"GPU-hours: {found.pace.said}", style="dim"))
    console.print()
    console.print(_runs(found))
    for one in found.left_out:
        console.print(Text(f"left out: {one.name}: {one.reason}", style="dim"))
    for warning in found.warnings:
        console.print(Text(f"doubt: {warning}", style="yellow"))


def _table(*titles: str, title: str | None = None) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(titles):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def _law(found: Study) -> Table:
    level, count = 100 * found.ensemble.level, len(found.runs)
    title = f"L(N, D) = E + A / N^alpha + B / D^beta   ({count} runs, {level:.3g} % intervals)"
    made = _table("NUMBER", "VALUE", "LOW", "HIGH", title=title)
    made.add_column("MEANING")
    for name, meaning in MEANINGS.items():
        one = found.numbers[name]
        made.add_row(name, *(f"{value:.4g}" for value in (one.value, one.low, one.high)), meaning)
    return made


def _answers(found: Study) -> Iterator[Table]:
    if found.forecast:
        yield _answer("Planned run", found.forecast)
    if found.recommendation:
        yield _answer("Best use of the budget", found.recommendation)


def _answer(title: str, one: Forecast | Recommendation) -> Table:
    made = _table("", "VALUE", "LOW", "HIGH", title=title)
    for name, value in (("parameters", one.parameters), ("tokens", one.tokens), ("loss", one.loss)):
        made.add_row(name, *_cells(value))
    made.add_row("FLOPs", f"{one.flops:.3g}")
    made.add_row("GPU-hours", "give --gpu" if one.gpu_hours is None else _hours(one.gpu_hours))
    return made


def _hours(gpu_hours: float) -> str:
    return f"{gpu_hours:,.3g}" if gpu_hours < 1000 else f"{gpu_hours:,.0f}"


def _cells(value: Any) -> list[str]:
    if not isinstance(value, Interval):
        return [f"{value:.4g}"]
    return [f"{part:.4g}" for part in (value.value, value.low, value.high)]


def _runs(found: Study) -> Table:
    made = _table("RUN", "N", "D", "FLOPS", "LOSS", "OFF THE LAW")
    for run, rest in zip(found.runs, found.fit.residuals, strict=True):
        numbers = (f"{value:.3g}" for value in (run.parameters, run.tokens, run.flops))
        made.add_row(Text(run.name), *numbers, f"{run.loss:.4f}", f"{100 * rest:+.2f} %")
    return made
