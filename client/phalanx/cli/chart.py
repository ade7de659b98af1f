"""Small charts in text. Pure: it owns how a list of numbers becomes characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def finite(values: Sequence[object]) -> list[float]:
    """The numbers among the values that can be drawn."""
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def resampled(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means of equal runs."""
    if len(values) <= width:
        return list(values)
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], *, width: int = 32, unicode: bool = True) -> str:
    """One line, low to high."""
    rows = bars(values, width=width, height=1, unicode=unicode)
    return rows[0] if rows else ""


def bars(values: Sequence[float], *, width: int, height: int, unicode: bool = True) -> list[str]:
    """`height` lines, top first; the lowest value still shows as one eighth of a cell."""
    drawn = resampled(values, width)
    if not drawn:
        return []
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    low, high = min(drawn), max(drawn)
    eighths = [1 + round((v - low) / ((high - low) or 1.0) * (8 * height - 1)) for v in drawn]
    return ["".join(blocks[min(8, max(0, e - 8 * row))] for e in eighths) for row in reversed(range(height))]


def chart(values: Sequence[float], *, width: int = 64, height: int = 8, unicode: bool = True) -> list[str]:
    """A chart with the scale at its left."""
    rows = bars(values, width=width, height=height, unicode=unicode)
    if not rows:
        return []
    drawn = resampled(values, width)
    labels = [f"{max(drawn):.4g}", *[""] * (len(rows) - 2), f"{min(drawn):.4g}"]
    margin = max(len(label) for label in labels)
    edge = "│" if unicode else "|"
    return [f"{label:>{margin}} {edge}{row}" for label, row in zip(labels, rows, strict=True)]
