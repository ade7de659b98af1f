"""How results are printed: as a table for people, JSON or YAML for programs. It owns formats, columns and how values
read (times, durations, sizes); it refuses to know where they come from.

Colour and width follow the terminal, NO_COLOR and TERM, as rich reads them; into a pipe a table is never truncated.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.units import duration_text

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 240

STATE_STYLES = {
    "queued": "yellow",
    "starting": "cyan",
    "running": "blue",
    "stopping": "magenta",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
    "ready": "green",
    "cordoned": "yellow",
    "draining": "yellow",
    "lost": "red",
}


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


Output = Annotated[Format, typer.Option("--output", "-o", help="How to print the result.")]


@dataclass(frozen=True)
class Column:
    """A column of a table: `show` makes the cell of an item."""

    title: str
    show: Callable[[Any], object]
    right: bool = False
    is_state: bool = False


def console(*, stderr: bool = False) -> Console:
    """A rich console on the stream as it is now (tests replace it)."""
    from rich.console import Console  # only what prints needs rich

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def data(value: Any, format: Format) -> None:
    """Print plain data as JSON or YAML."""
    if format is Format.YAML:
        import yaml

        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    sys.stdout.write(text)


def record(value: Any, format: Format) -> None:
    """Print one record of a stream at once: JSON on a line of its own, or a YAML document."""
    if format is Format.YAML:
        print("---")
        data(value, format)
        sys.stdout.flush()
    else:
        print(json.dumps(value, ensure_ascii=False), flush=True)


def items(found: Iterable[Any], columns: Sequence[Column], format: Format, *, empty: str) -> None:
    """Print a list of models."""
    found = list(found)
    if format is not Format.TABLE:
        return data([item.raw for item in found], format)
    if not found:
        return console(stderr=True).print(empty, style="dim")
    console().print(table(found, columns))


def table(found: Iterable[Any], columns: Sequence[Column]) -> Any:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.title, justify="right" if column.right else "left", no_wrap=column is columns[0])
    for item in found:
        made.add_row(*(_cell(column, item) for column in columns))
    return made


def _cell(column: Column, item: Any) -> Any:
    from rich.text import Text

    value = column.show(item)
    text = "–" if value is None or value == "" else str(value)
    return Text(text, style=STATE_STYLES.get(text, "") if column.is_state else "")


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values under each other; those without a value are left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None and value != "":
            grid.add_row(name, Text(str(value)))
    console().print(grid)


# ------------------------------------------------------------------ how values read


def ago(at: datetime | None, *, now: datetime | None = None) -> str | None:
    """`3 min ago`, `in 2 h`."""
    if at is None:
        return None
    seconds = ((now or datetime.now(UTC)) - at).total_seconds()
    return f"{duration_text(seconds)} ago" if seconds >= 0 else f"in {duration_text(-seconds)}"


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def local(at: datetime | None) -> str | None:
    """A time in the zone of this machine."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else None


def gibibytes(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def number(value: object) -> str:
    """A metric's value: short, but never rounded to nothing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def unicode_output() -> bool:
    """Whether stdout can show block characters."""
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
