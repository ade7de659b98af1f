"""What the data cannot tell: whether runs determine the five numbers at all, and what to doubt about a fit. It owns the
rules and the words, which say what to run; it refuses to fit.

The law is E plus a function of N with two numbers plus one of D with two. Differences between three sizes determine the
one, between three token counts the other, if N and D do not grow in step; then E is the rest.
"""

import math
from collections.abc import Sequence

import numpy as np

from phalanx_server.scaling.fit import Fit, Sample, Vector
from phalanx_server.scaling.runs import Run
from phalanx_server.scaling.uncertainty import FREE_NUMBERS, Ensemble, Interval, numbers_of

FEWEST_RUNS = 5
FEWEST_LEVELS = 3
DISTINCT = 1.1  # two values closer than this ratio count as one
STEP = 4.0  # how far from the others a new size or token count is proposed
IN_STEP = math.log(1.25)  # tokens that vary less than this around a power of N grow in step with it
FEW_RUNS = 15
MOST_UNDETERMINED = 0.05
NARROW = 8.0  # of N or D from the least to the most
WIDE = 3.0  # of an exponent's interval from low to high
OUTLIER = 8.0  # times the usual residual
SMALL_RESIDUAL = 0.005
FAR = 10.0  # beyond the data, in compute


class CannotTell(ValueError):
    """The runs do not determine the law; the message says which to add."""


def levels(values: Vector) -> list[float]:
    """The distinct values, each at least DISTINCT times the one before."""
    found: list[float] = []
    for value in np.sort(values):
        if not found or value > DISTINCT * found[-1]:
            found.append(float(value))
    return found


def determined(sample: Sample) -> bool:
    """Whether the runs determine the five numbers."""
    return not problems(sample)


def refuse_too_little(sample: Sample) -> None:
    """CannotTell with all that is missing, and which runs to add."""
    found = problems(sample)
    if found:
        raise CannotTell("; ".join(found))


def problems(sample: Sample) -> list[str]:
    """Why the law is not determined, one sentence each, with the runs that would help."""
    if len(sample) == 0:
        return ["there are no runs to fit: 9 would do, of 3 sizes with 3 token counts each"]
    sizes, counts = levels(sample.parameters), levels(sample.tokens)
    found = []
    if len(sample) < FEWEST_RUNS:
        found.append(f"5 numbers need at least {FEWEST_RUNS} runs (9 or more are better), there are {len(sample)}")
    if len(sizes) < FEWEST_LEVELS:
        more = _others(sizes)
        found.append(f"{_so_many('size', sizes, 'N')}: add runs with N = {more} parameters, at D = {_some(counts)}")
    if len(counts) < FEWEST_LEVELS:
        more = _others(counts)
        found.append(f"{_so_many('token count', counts, 'D')}: add runs with D = {more} tokens, at N = {_some(sizes)}")
    if len(sizes) >= FEWEST_LEVELS <= len(counts) and _in_step(sample):
        found.append(_in_step_says(sample))
    if found and len(sample) < FEWEST_RUNS and len(found) == 1:
        found[0] += f": add {FEWEST_RUNS - len(sample)} or more, such as N = {_some(sizes)} with other D"
    return found


def _in_step(sample: Sample) -> bool:
    log_n, log_d = np.log(sample.parameters), np.log(sample.tokens)
    rest = log_d - np.polyval(np.polyfit(log_n, log_d, 1), log_n)
    return float(rest.std()) < IN_STEP


def _in_step_says(sample: Sample) -> str:
    middle = int(np.argsort(sample.parameters)[len(sample) // 2])
    size, count = sample.parameters[middle], sample.tokens[middle]
    return (
        "tokens grow in step with parameters, so that their effects cannot be told apart: add runs that break the "
        f"step, such as N = {size:.2g} with D = {count / STEP:.2g} and D = {count * STEP:.2g}"
    )


def _so_many(what: str, found: list[float], letter: str) -> str:
    if len(found) == 1:
        return f"all runs have one {what}, {letter} = {found[0]:.2g}, where {FEWEST_LEVELS} are needed"
    return f"there are only {len(found)} {what}s, {letter} = {_some(found)}, where {FEWEST_LEVELS} are needed"


def _others(found: list[float]) -> str:
    """New values that make the levels enough: above, then below."""
    new = [found[-1] * STEP, found[0] / STEP][: FEWEST_LEVELS - len(found)]
    return " and ".join(f"{value:.2g}" for value in new)


def _some(found: list[float]) -> str:
    shown = found if len(found) <= 3 else [found[0], found[len(found) // 2], found[-1]]
    return ", ".join(f"{value:.2g}" for value in shown)


# ------------------------------------------------------------------ doubts about a fit


def doubts(runs: Sequence[Run], sample: Sample, fit: Fit, ensemble: Ensemble) -> list[str]:
    """What to think of before one trusts a fit, one sentence each."""
    numbers = numbers_of(fit.law, ensemble)
    return [
        *_about_data(sample, ensemble),
        *_about_fit(fit),
        *_about_numbers(numbers),
        *_outliers(runs, fit),
    ]


def _about_data(sample: Sample, ensemble: Ensemble) -> list[str]:
    found, share = [], ensemble.undetermined / len(ensemble.laws)
    if share > MOST_UNDETERMINED:
        found.append(f"the intervals mean nothing: {100 * share:.0f} % of the resamples determine no law; add runs")
    elif len(sample) < FEW_RUNS:
        found.append(
            f"{len(sample)} runs are few: intervals of a bootstrap over fewer than {FEW_RUNS} may be too narrow"
        )
    for what, values in (("parameters", sample.parameters), ("tokens", sample.tokens)):
        ratio = float(values.max() / values.min())
        if ratio < NARROW:
            found.append(
                f"{what} vary only {ratio:.1f}-fold: the exponent is hardly determined below {NARROW:.0f}-fold"
            )
    return found


def _about_fit(fit: Fit) -> list[str]:
    found = []
    if 2 * fit.agreeing < fit.starts:
        found.append(f"only {fit.agreeing} of {fit.starts} starts ended at this law: others fit almost as well")
    for term in fit.missing:
        grows = {"A": "more sizes", "B": "more token counts", "E": "longer and larger runs"}[term]
        found.append(f"the runs show no trace of the {term} term; add {grows}")
    return found


def _about_numbers(numbers: dict[str, Interval]) -> list[str]:
    axes = {"alpha": "sizes", "beta": "token counts"}
    return [
        f"{name} may be anything from {one.low:.2g} to {one.high:.2g}: add {axes[name]} further apart"
        for name, one in numbers.items()
        if name in axes and one.high > WIDE * one.low
    ]


def _outliers(runs: Sequence[Run], fit: Fit) -> list[str]:
    size = np.sort(np.abs(fit.residuals))[min(FREE_NUMBERS, len(runs) - 1) :]  # five runs may be met exactly
    limit = max(SMALL_RESIDUAL, OUTLIER * float(np.median(size)))
    return [
        f"{run.name} is {100 * math.expm1(rest):+.1f} % off the law and hardly counts: did its training go well?"
        for run, rest in zip(runs, fit.residuals, strict=True)
        if abs(rest) > limit
    ]


def how_far(sample: Sample, *, parameters: float, tokens: float) -> str | None:
    """What to doubt about a forecast that lies far beyond the runs."""
    beyond = parameters * tokens / float((sample.parameters * sample.tokens).max())
    if beyond <= FAR:
        return None
    return (
        f"N = {parameters:.2g}, D = {tokens:.2g} takes {beyond:.2g} times the compute of the largest run: the interval "
        "holds only if the law does so far out"
    )
