"""The table that a load benchmark prints: each contender's figure with its spread, the budget, and the ratio.

Owns its form. A figure is the median over rounds, with the least and the most of them beside it; a peer's ratio says by
how much Phalanx is better than it in this same run (above 1: better).
"""

import argparse
import statistics
from dataclasses import dataclass, field

import measure


@dataclass(frozen=True)
class Budget:
    """What a figure must reach: `at_least` for rates, else at most, for times."""

    limit: float
    at_least: bool

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {number(self.limit)}"

    def verdict(self, value: float) -> str:
        held = value >= self.limit if self.at_least else value <= self.limit
        return f"{self} {'held' if held else 'MISSED'}"


@dataclass(frozen=True)
class Line:
    """One contender's figures by round; `against` is the line of ours that a peer is compared with."""

    name: str
    values: list[float]
    budget: Budget | None = None
    against: "Line | None" = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def ratio(self, *, higher_is_better: bool) -> str:
        if self.against is None:
            return ""
        ours, theirs = self.against.median, self.median
        return f"{ours / theirs if higher_is_better else theirs / ours:,.2f}×"


@dataclass
class Report:
    """Lines of one unit. What could not be measured is said below the table."""

    title: str
    unit: str
    higher_is_better: bool
    lines: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def ours(self, name: str, values: list[float], limit: float | None = None, note: str = "") -> Line:
        budget = Budget(limit, self.higher_is_better) if limit is not None else None
        return self._add(Line(name, values, budget, note=note))

    def peer(self, name: str, values: list[float], against: Line, note: str = "") -> Line:
        return self._add(Line(name, values, against=against, note=note))

    def _add(self, line: Line) -> Line:
        self.lines.append(line)
        return line

    def show(self) -> None:
        columns = ["", "n", "median", "min–max", "budget", "Phalanx better by", ""]
        measure.show(f"{self.title} ({self.unit})", columns, [self._row(line) for line in self.lines])
        for remark in self.remarks:
            print(f"  {remark}")
        print()

    def _row(self, line: Line) -> list[str]:
        spread = f"{number(min(line.values))}–{number(max(line.values))}"
        verdict = line.budget.verdict(line.median) if line.budget else ""
        ratio = line.ratio(higher_is_better=self.higher_is_better)
        return [line.name, str(len(line.values)), number(line.median), spread, verdict, ratio, line.note]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"


def percentiles(values: list[float], *shares: float) -> list[float]:
    return [measure.percentile(values, share) for share in shares]


def arguments(description: str | None, **more: int) -> argparse.Namespace:
    """`--quick`, and one whole-numbered option for each of `more`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()
