"""A whole study: runs in, law with intervals, doubts and answers out. It owns the order of the steps and the result as
plain data; it refuses to print.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from phalanx_server.scaling.diagnosis import determined, doubts, how_far, refuse_too_little
from phalanx_server.scaling.fit import Fit, fit
from phalanx_server.scaling.outlook import Forecast, Pace, Recommendation, forecast, pace_of, recommend
from phalanx_server.scaling.runs import LeftOut, Run, flops_per_parameter_token, sample_of
from phalanx_server.scaling.uncertainty import Ensemble, Interval, bootstrap, numbers_of


@dataclass(frozen=True)
class Question:
    """What is asked. `planned`: N and D of a run. The budget is in FLOPs, or in GPU-hours, which need a pace."""

    planned: tuple[float, float] | None = None
    budget_flops: float | None = None
    budget_gpu_hours: float | None = None
    gpu: str | None = None
    mfu: float | None = None
    precision: str = "bf16"
    level: float = 0.9
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """All that was found. `k`: FLOPs per parameter and token."""

    question: Question
    runs: list[Run]
    left_out: list[LeftOut]
    fit: Fit
    ensemble: Ensemble
    numbers: dict[str, Interval]
    k: float
    pace: Pace | None
    forecast: Forecast | None = None
    recommendation: Recommendation | None = None
    warnings: list[str] = field(default_factory=list)


def study(
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    asked: Question,
    told: Callable[[int], object] = lambda _: None,
) -> Study:
    """Fit, bootstrap, answer. `told` is told how many resamples are fitted, after each. CannotTell where the runs do
    not determine the law; ValueError for an unknown GPU or a budget of GPU-hours without a pace."""
    runs = list(runs)
    sample = sample_of(runs)
    refuse_too_little(sample)
    pace = pace_of(runs, gpu=asked.gpu, mfu=asked.mfu, precision=asked.precision)
    budget = _budget(asked, pace)
    found = fit(sample)
    ensemble = bootstrap(
        sample, found, level=asked.level, resamples=asked.resamples, seed=asked.seed, usable=determined, told=told
    )
    k = flops_per_parameter_token(runs)
    planned = best = None
    if asked.planned:
        parameters, tokens = asked.planned
        planned = forecast(found.law, ensemble, parameters=parameters, tokens=tokens, k=k, pace=pace)
    if budget:
        best = recommend(found.law, ensemble, flops=budget, k=k, pace=pace)
    numbers = numbers_of(found.law, ensemble)
    warnings = doubts(runs, sample, found, ensemble)
    targets = ([asked.planned] if asked.planned else []) + (
        [(best.parameters.value, best.tokens.value)] if best else []
    )
    warnings += [far for n, d in targets if (far := how_far(sample, parameters=n, tokens=d))]
    return Study(asked, runs, list(left_out), found, ensemble, numbers, k, pace, planned, best, warnings)


def _budget(asked: Question, pace: Pace | None) -> float | None:
    """The budget in FLOPs."""
    if asked.budget_gpu_hours is None:
        return asked.budget_flops
    if pace is None:
        raise ValueError(
            "GPU-hours need a pace: give --gpu h100 (and --mfu 0.4), or runs on GPUs that report tokens_per_s"
        )
    return pace.flops(asked.budget_gpu_hours)


def document(found: Study) -> dict[str, Any]:
    """The study as plain data. `runs` can be read again with --runs."""
    fitted = found.fit.law.loss(
        *(np.array([getattr(run, name) for run in found.runs]) for name in ("parameters", "tokens"))
    )
    return {
        "law": {name: asdict(one) for name, one in found.numbers.items()},
        "interval": {"level": found.question.level, "method": "bootstrap over runs, percentiles",
                     "resamples": found.question.resamples, "seed": found.question.seed},
        "fit": {"objective": found.fit.objective, "starts": found.fit.starts, "agreeing": found.fit.agreeing},
        "flops_per_parameter_token": found.k,
        "pace": None if found.pace is None else asdict(found.pace),
        "forecast": None if found.forecast is None else asdict(found.forecast),
        "recommendation": None if found.recommendation is None else asdict(found.recommendation),
        "warnings": found.warnings,
        "runs": [asdict(run) | {"fitted_loss": float(loss)} for run, loss in zip(found.runs, fitted, strict=True)],
        "left_out": [asdict(one) for one in found.left_out],
    }  # fmt: skip
