"""How sure a fit is: a bootstrap over runs. It owns the resampling and the intervals; it refuses to know what they are
of.

Runs are drawn with replacement, as many as there are, and the law is fitted to each draw; an interval is between
percentiles of the results. (Hoffmann et al. draw 80 % of the runs and give the 10th and 90th percentile; that is
narrower. Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102, found the intervals of that paper's approach 3 so
narrow that 600,000 runs would be needed for them, where it had fewer than 500.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phalanx_server.scaling.fit import Fit, Sample, Vector, fit
from phalanx_server.scaling.law import Law

DRAWS_PER_RESAMPLE = 20
"""A draw of too few distinct sizes is drawn again, at most so often."""
FREE_NUMBERS = 5
AROUND = (0.5, 1.0, 2.0)
"""Exponents next to those found, as starts: the law of a draw may be another, with a term that all runs do not show."""


@dataclass(frozen=True)
class Interval:
    """A number with the bounds that hold it as often as the level says."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ensemble:
    """Laws of resampled runs, and one residual for each (log of observed over fitted loss): together they say how
    the loss of another run may come out. For `undetermined` of the laws no draw of runs determined one: they are that
    of all runs."""

    laws: tuple[Law, ...]
    residuals: Vector
    level: float
    undetermined: int = 0

    def interval(self, value: float, others: ArrayLike) -> Interval:
        """`value` with the percentiles of `others`, (resamples,)."""
        tail = 50 * (1 - self.level)
        low, high = np.percentile(np.asarray(others, dtype=float), [tail, 100 - tail])
        return Interval(float(value), float(low), float(high))

    def losses(self, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
        """(resamples, …): what each law says."""
        return np.stack([law.loss(parameters, tokens) for law in self.laws])

    def of_run(self, law: Law, *, parameters: float, tokens: float) -> Interval:
        """The loss of a run that is still to come: the law is not sure, and the run will be off it as others were."""
        return self.interval(
            float(law.loss(parameters, tokens)), self.losses(parameters, tokens) * np.exp(self.residuals)
        )


def bootstrap(
    sample: Sample,
    found: Fit,
    *,
    level: float,
    resamples: int,
    seed: int,
    usable: Callable[[Sample], bool],
    told: Callable[[int], object] = lambda _: None,
) -> Ensemble:
    """Fits to `resamples` draws of runs; the same for the same seed. `usable` says whether a draw determines a law;
    `told` is told how many draws are fitted, after each."""
    random = np.random.default_rng(seed)
    draws = [_draw(sample, random, usable) for _ in range(resamples)]
    laws = []
    for draw in draws:
        laws.append(found.law if draw is None else _refit(draw, found.law))
        told(len(laws))
    spread = np.sqrt(len(sample) / max(1, len(sample) - FREE_NUMBERS))  # a fit is closer to its runs than to others
    residuals = random.choice(found.residuals, size=resamples) * spread
    return Ensemble(tuple(laws), residuals, level, undetermined=draws.count(None))


def _draw(sample: Sample, random: np.random.Generator, usable: Callable[[Sample], bool]) -> Sample | None:
    for _ in range(DRAWS_PER_RESAMPLE):
        drawn = sample.take(random.integers(len(sample), size=len(sample)))
        if usable(drawn):
            return drawn
    return None


def _refit(draw: Sample, law: Law) -> Law:
    grid = [(law.alpha * of_alpha, law.beta * of_beta) for of_alpha in AROUND for of_beta in AROUND]
    return fit(draw, near=[law], grid=grid, refined=1).law


def numbers_of(law: Law, ensemble: Ensemble) -> dict[str, Interval]:
    """The five numbers, and `a`: the share of more compute that goes into parameters, N ∝ C^a."""
    names = ("E", "A", "B", "alpha", "beta")
    found = {
        name: ensemble.interval(getattr(law, name), [getattr(one, name) for one in ensemble.laws]) for name in names
    }
    return found | {"a": ensemble.interval(_into_size(law), [_into_size(one) for one in ensemble.laws])}


def _into_size(law: Law) -> float:
    return law.beta / (law.alpha + law.beta)
