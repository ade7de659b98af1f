"""A study as a picture (SVG): loss over compute, both logarithmic; a curve for each size, the best split of compute
with its band, and the runs. It owns the drawing alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from phalanx_server.scaling.diagnosis import levels
from phalanx_server.scaling.fit import Vector
from phalanx_server.scaling.study import Study

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 60
MOST_CURVES = 8
SMALLEST, LARGEST = (0x7F, 0xB3, 0xE6), (0x12, 0x2E, 0x66)
"""Colours of sizes, as red, green, blue; others lie between."""
AROUND = 2.0
"""Curves go on so far beyond the runs."""
STYLE = (
    "text{font:12px sans-serif;fill:#222}.head{font-weight:bold;font-size:14px}.end{text-anchor:end}"
    ".mid{text-anchor:middle}.grid{stroke:#e4e7ec}.curve{fill:none;stroke-width:1.5}.dot{stroke:#fff}"
    ".frontier{fill:none;stroke:#c2410c;stroke-width:2;stroke-dasharray:6 3}.band{fill:#c2410c;opacity:.15}"
    ".next{fill:#c2410c;stroke:#fff}.bar{stroke:#c2410c;stroke-width:1.5}"
)


@dataclass(frozen=True)
class Axes:
    """Logarithms to pixels."""

    least_flops: float
    most_flops: float
    least_loss: float
    most_loss: float

    def x(self, flops: float) -> float:
        part = math.log(flops / self.least_flops) / math.log(self.most_flops / self.least_flops)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        part = math.log(loss / self.least_loss) / math.log(self.most_loss / self.least_loss)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    def path(self, flops: Vector, losses: Vector) -> str:
        return " ".join(f"{self.x(c):.1f},{self.y(loss):.1f}" for c, loss in zip(flops, losses, strict=True))


def svg(found: Study) -> str:
    """The picture as text."""
    sizes = _shown(levels(np.array([run.parameters for run in found.runs])))
    axes = _axes(found)
    shapes = [*_grid(axes), *_frontier(found, axes), *_curves(found, axes, sizes), *_runs(found, axes, sizes)]
    shapes += [*_next(found, axes), *_legend(found, sizes)]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>Loss over training compute</title>'
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", back, *shapes, "</svg>", ""])


def _shown(sizes: list[float]) -> list[float]:
    """At most MOST_CURVES of the sizes, evenly chosen."""
    if len(sizes) <= MOST_CURVES:
        return sizes
    return [sizes[round(place)] for place in np.linspace(0, len(sizes) - 1, MOST_CURVES)]


def _axes(found: Study) -> Axes:
    """Room for the runs, the answers and the frontier."""
    answers = [one for one in (found.forecast, found.recommendation) if one]
    flops = [run.flops for run in found.runs] + [one.flops for one in answers]
    low, high = min(flops) / AROUND, max(flops) * AROUND
    losses = [run.loss for run in found.runs] + [bound for one in answers for bound in (one.loss.low, one.loss.high)]
    losses.append(float(found.fit.law.best_loss(high, flops_per_parameter_token=found.k)))
    return Axes(low, high, min(losses) * 0.97, max(losses) * 1.03)


def _grid(axes: Axes) -> list[str]:
    shapes = ['<text x="70" y="24" class="head">Final loss over training compute</text>']
    for power in _powers(axes.least_flops, axes.most_flops):
        x = axes.x(10.0**power)
        shapes.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="mid">1e{power}</text>')
    for loss in _round_between(axes.least_loss, axes.most_loss):
        y = axes.y(loss)
        shapes.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{loss:.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 16}" class="mid">training compute (FLOPs)</text>')
    turned = f'transform="rotate(-90 18 {HEIGHT / 2})"'
    return [*shapes, f'<text x="18" y="{HEIGHT / 2}" class="mid" {turned}>loss (nats per token)</text>']


def _powers(low: float, high: float) -> list[int]:
    every = max(1, math.ceil((math.log10(high) - math.log10(low)) / 8))
    return list(range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1, every))


def _round_between(low: float, high: float) -> list[float]:
    """About six round numbers."""
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _frontier(found: Study, axes: Axes) -> list[str]:
    flops = np.geomspace(axes.least_flops, axes.most_flops, 80)
    law, k = found.fit.law, found.k
    others = np.stack([one.best_loss(flops, flops_per_parameter_token=k) for one in found.ensemble.laws])
    best = law.best_loss(flops, flops_per_parameter_token=k)
    return [
        _band(found, axes, flops, others, 'class="band"'),
        f'<polyline points="{_clipped(axes, flops, best)}" class="frontier"/>',
    ]


def _band(found: Study, axes: Axes, flops: Vector, others: Vector, look: str) -> str:
    tail = 50 * (1 - found.ensemble.level)
    low, high = (
        np.clip(edge, axes.least_loss, axes.most_loss) for edge in np.percentile(others, [tail, 100 - tail], axis=0)
    )
    return f'<polygon points="{axes.path(flops, high)} {axes.path(flops[::-1], low[::-1])}" {look}/>'


def _clipped(axes: Axes, flops: Vector, losses: Vector) -> str:
    inside = (losses >= axes.least_loss) & (losses <= axes.most_loss)
    return axes.path(flops[inside], losses[inside])


def _curves(found: Study, axes: Axes, sizes: Sequence[float]) -> list[str]:
    """One for each size, over the tokens that any run had, with the band of the law."""
    counts = [run.tokens for run in found.runs]
    tokens = np.geomspace(min(counts) / AROUND, max(counts) * AROUND, 60)
    shapes = []
    for size in sizes:
        flops, colour = found.k * size * tokens, _colour(size, sizes)
        inside = (flops >= axes.least_flops) & (flops <= axes.most_flops)
        others = found.ensemble.losses(size, tokens[inside])
        losses = found.fit.law.loss(size, tokens)
        shapes.append(_band(found, axes, flops[inside], others, f'fill="{colour}" opacity=".18"'))
        points = _clipped(axes, flops[inside], losses[inside])
        shapes.append(f'<polyline points="{points}" class="curve" stroke="{colour}"/>')
    return shapes


def _runs(found: Study, axes: Axes, sizes: Sequence[float]) -> list[str]:
    return [
        f'<circle cx="{axes.x(run.flops):.1f}" cy="{axes.y(run.loss):.1f}" r="4" class="dot" '
        f'fill="{_colour(run.parameters, sizes)}"><title>{escape(run.name)}: N = {run.parameters:.3g}, '
        f"D = {run.tokens:.3g}, loss {run.loss:.4g}</title></circle>"
        for run in found.runs
    ]


def _next(found: Study, axes: Axes) -> list[str]:
    """The planned run and the recommended one, with the interval of their loss."""
    shapes = []
    for what, one in (("planned", found.forecast), ("recommended", found.recommendation)):
        if one is None:
            continue
        x, y = axes.x(one.flops), axes.y(one.loss.value)
        low, high = axes.y(one.loss.low), axes.y(one.loss.high)
        shapes.append(f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" class="bar"/>')
        shapes.append(f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" class="next"><title>{what}</title></path>')
        shapes.append(f'<text x="{x - 10:.1f}" y="{y + 20:.1f}" class="end">{what}</text>')
    return shapes


def _legend(found: Study, sizes: Sequence[float]) -> list[str]:
    x, y = WIDTH - RIGHT + 20, TOP + 10
    shapes = [f'<text x="{x}" y="{y}" class="head">parameters</text>']
    for size in reversed(sizes):
        y += 20
        shapes.append(f'<circle cx="{x + 6}" cy="{y - 4}" r="5" fill="{_colour(size, sizes)}"/>')
        shapes.append(f'<text x="{x + 20}" y="{y}">{size:.3g}</text>')
    y += 30
    shapes.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" class="frontier"/>')
    shapes.append(f'<text x="{x + 34}" y="{y}">best split</text>')
    shapes.append(f'<text x="{x}" y="{y + 20}">bands: {100 * found.ensemble.level:.3g} % interval</text>')
    return shapes


def _colour(size: float, sizes: Sequence[float]) -> str:
    """Between the two colours by the logarithm of the size."""
    span = math.log(sizes[-1] / sizes[0])
    part = min(1.0, max(0.0, math.log(size / sizes[0]) / span)) if span else 1.0
    mixed = (round(low + part * (high - low)) for low, high in zip(SMALLEST, LARGEST, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
