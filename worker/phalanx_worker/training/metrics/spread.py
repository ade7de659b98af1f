"""How the ranks compare: one small table of what each measured, and what is said of it.

Owns the table and the one collective that fills it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Times:
    """The parts of a step of one rank, in seconds, and its GPU: means over a window. `comm_s` is communication that is
    not hidden behind computing; the parts add up to `step_time_s`."""

    step_time_s: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_s: float = 0.0
    other_s: float = 0.0
    gpu_utilization: float = 0.0
    gpu_memory_bytes: float = 0.0

    @property
    def own_work_s(self) -> float:
        """What the rank does itself, of which others have to await the end."""
        return self.compute_s + self.data_wait_s


_NAMES = tuple(field.name for field in fields(Times))
_UNITS = ("_s", "_bytes")


@dataclass(frozen=True)
class Spread:
    """The same window on every rank, in their order; `steps` long."""

    ranks: tuple[Times, ...]
    steps: int

    @property
    def step_time_s(self) -> float:
        """The median: the same number on every rank."""
        return median(times.step_time_s for times in self.ranks)

    @property
    def work_s(self) -> list[float]:
        return [times.own_work_s for times in self.ranks]

    def metrics(self) -> dict[str, float]:
        """`compute_min_s`, `compute_median_s`, `compute_max_s`, `compute_max_rank` and so on, and `slowest_rank`: the
        one with the most work of its own."""
        told: dict[str, float] = {}
        for name in _NAMES:
            values = [getattr(times, name) for times in self.ranks]
            if any(values):
                unit = next((unit for unit in _UNITS if name.endswith(unit)), "")
                stem = name.removesuffix(unit)
                told[f"{stem}_min{unit}"] = min(values)
                told[f"{stem}_median{unit}"] = median(values)
                told[f"{stem}_max{unit}"] = max(values)
                told[f"{stem}_max_rank"] = _place_of_largest(values)
        told["own_work_max_s"] = max(self.work_s)
        told["slowest_rank"] = _place_of_largest(self.work_s)
        return told


def gather(own: Times, *, steps: int, device: torch.device) -> Spread:
    """Everyone's times; every rank calls it at the same step."""
    mine = torch.tensor([getattr(own, name) for name in _NAMES], dtype=torch.float64)
    if device.type == "cuda":
        mine = mine.to(device)
    everyones = mine.new_empty(dist.get_world_size() * len(_NAMES))
    dist.all_gather_single(everyones, mine)
    return Spread(tuple(Times(*row) for row in everyones.view(-1, len(_NAMES)).tolist()), steps)


def _place_of_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
