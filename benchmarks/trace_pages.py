"""The results of benchmarks/traces.py as tables (Markdown) and as a picture (SVG)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

OURS, BOUND, RECORDED = "ours", "bound", "theirs"


@dataclass(frozen=True)
class Row:
    """One policy on one workload; of what others recorded, the mean alone is known. `aim`: the mean that it should stay
    below."""

    policy: str
    kind: str
    figures: Mapping[str, float]
    aim: float | None = None

    @property
    def jct_s(self) -> float:
        return self.figures["avg_jct_s"]

    def shown(self, name: str) -> str:
        return f"{self.figures[name]:,.0f}" if name in self.figures else ""

    def per_job(self, name: str) -> str:
        return f"{self.figures[name] / self.figures['jobs']:.2f}" if name in self.figures else ""


HEAD = "| policy | mean (s) | ÷ aim | p50 (s) | p99 (s) | makespan (s) | evictions per job | resizes per job |"


def markdown(results: Mapping[str, Sequence[Row]]) -> str:
    """A table per workload, the shortest mean first."""
    parts = []
    for name, rows in results.items():
        parts += [f"### {name}", "", HEAD, "|---|---:|---:|---:|---:|---:|---:|---:|"]
        for row in sorted(rows, key=lambda row: row.jct_s):
            cells = [
                f"**{row.policy}**" if row.kind == OURS else row.policy,
                row.shown("avg_jct_s"),
                f"{row.jct_s / row.aim:.2f}" if row.aim is not None and row.kind == OURS else "",
                *(row.shown(figure) for figure in ("p50_jct_s", "p99_jct_s", "makespan_s")),
                *(row.per_job(figure) for figure in ("preemptions", "resizes")),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def svg(results: Mapping[str, Sequence[Row]]) -> str:
    """Bars by workload, each as long as its mean next to the workload's largest."""
    line, left, width, right = 18, 310, 420, 90
    y, shapes = 10, []
    for name, rows in results.items():
        most = max(row.jct_s for row in rows)
        y += line
        shapes.append(f'<text x="10" y="{y}" class="head">{escape(name)}: average job completion time</text>')
        for row in sorted(rows, key=lambda row: row.jct_s):
            y += line
            length = width * row.jct_s / most
            shapes += [
                f'<text x="{left - 8}" y="{y}" class="name">{escape(row.policy)}</text>',
                f'<rect x="{left}" y="{y - 12}" width="{length:.1f}" height="14" class="{row.kind}"/>',
                f'<text x="{left + length + 6:.1f}" y="{y}">{row.jct_s:,.0f} s</text>',
            ]
        y += line // 2
    style = (
        "text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.name{text-anchor:end}"
        ".ours{fill:#2a6fdb}.theirs{fill:#9aa4b2}.bound{fill:#d8dde4}"
    )
    size = f'viewBox="0 0 {left + width + right} {y + 10}" width="{left + width + right}" height="{y + 10}"'
    back = f'<rect width="{left + width + right}" height="{y + 10}" fill="#fff"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>", back, *shapes, "</svg>", ""]
    )
