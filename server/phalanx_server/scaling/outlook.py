"""What a law says about runs still to come: the loss and GPU-hours of one, and the best use of a budget. It owns how
compute becomes GPU-hours; it refuses to fit.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from phalanx.recipes import devices

from phalanx_server.scaling.law import Law
from phalanx_server.scaling.runs import Run
from phalanx_server.scaling.uncertainty import Ensemble, Interval

USUAL_MFU = 0.4
"""Share of a GPU's peak that well-made training reaches; PaLM 0.46 (https://arxiv.org/abs/2204.02311, table 3)."""
HOUR_S = 3600.0


@dataclass(frozen=True)
class Pace:
    """What one GPU achieves, in FLOP/s, and where that is from."""

    flops_per_s: float
    said: str

    def gpu_hours(self, flops: float) -> float:
        return flops / self.flops_per_s / HOUR_S

    def flops(self, gpu_hours: float) -> float:
        return gpu_hours * self.flops_per_s * HOUR_S


@dataclass(frozen=True)
class Forecast:
    """A planned run: its loss with the interval of a run, and its GPU-hours where a pace is known."""

    parameters: float
    tokens: float
    flops: float
    loss: Interval
    gpu_hours: float | None


@dataclass(frozen=True)
class Recommendation:
    """The best use of a budget. The intervals of N and D say where the best may lie; that of the loss is of a run with
    this N and D."""

    flops: float
    parameters: Interval
    tokens: Interval
    loss: Interval
    gpu_hours: float | None


def pace_of(runs: Sequence[Run], *, gpu: str | None, mfu: float | None, precision: str) -> Pace | None:
    """What a GPU achieves: a share of the peak of `gpu`, measured by runs on it unless `mfu` is given; without `gpu`
    what runs achieved on the GPUs that most of them had. None where nothing tells. ValueError: unknown GPU."""
    if gpu is None:
        usual = Counter(run.gpu_type for run in runs if run.flops_per_s_per_gpu).most_common(1)
        return _measured(runs, usual[0][0]) if usual else None
    device = devices.find(gpu)
    measured = _measured([run for run in runs if _is_of(run, device)], None) if mfu is None else None
    if measured is not None:
        return measured
    share = USUAL_MFU if mfu is None else mfu
    how = "assumed" if mfu is None else "given"
    return Pace(share * device.peak_flops(precision), f"{device.name} {precision} at {100 * share:.3g} % MFU ({how})")


def _measured(runs: Sequence[Run], gpu_type: str | None) -> Pace | None:
    """The median of the runs on that type; of all of them for None."""
    fitting = [run for run in runs if gpu_type in (None, run.gpu_type)]
    rates = [rate for run in fitting if (rate := run.flops_per_s_per_gpu)]
    if not rates:
        return None
    where = next(run.gpu_type for run in fitting if run.flops_per_s_per_gpu) or "their GPUs"
    return Pace(float(np.median(rates)), f"measured by {len(rates)} runs on {where}")


def _is_of(run: Run, device: devices.Device) -> bool:
    try:
        return bool(run.gpu_type) and devices.find(run.gpu_type) == device
    except ValueError:
        return False


def forecast(
    law: Law, ensemble: Ensemble, *, parameters: float, tokens: float, k: float, pace: Pace | None
) -> Forecast:
    """The planned run of N parameters and D tokens; `k` FLOPs per parameter and token."""
    flops = k * parameters * tokens
    loss = ensemble.of_run(law, parameters=parameters, tokens=tokens)
    return Forecast(parameters, tokens, flops, loss, pace.gpu_hours(flops) if pace else None)


def recommend(law: Law, ensemble: Ensemble, *, flops: float, k: float, pace: Pace | None) -> Recommendation:
    """The size and tokens with the least loss for `flops`."""
    parameters, tokens = map(float, law.best_split(flops, flops_per_parameter_token=k))
    others = np.array([one.best_split(flops, flops_per_parameter_token=k) for one in ensemble.laws])
    return Recommendation(
        flops=flops,
        parameters=ensemble.interval(parameters, others[:, 0]),
        tokens=ensemble.interval(tokens, others[:, 1]),
        loss=ensemble.of_run(law, parameters=parameters, tokens=tokens),
        gpu_hours=pace.gpu_hours(flops) if pace else None,
    )
