"""How much arithmetic a step is, and how much a device can do: the two sides of MFU (model FLOP/s utilization,
Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

Owns both counts. Recomputed activations and padding are not work: the model is counted as if one rank ran it plainly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from phalanx.recipes import devices
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from phalanx_worker.training.task import Task

PEAK_SIZE = 1024  # of the square matrices by which a CPU's peak is measured
PEAK_TRIES = 4


@dataclass(frozen=True)
class Work:
    """`flops` are of one step over all ranks, forward and backward."""

    parameters: int
    flops: float


def count_work(task: Task, batch: Mapping[str, Tensor]) -> Work:
    """What the whole model does with a global batch, of which only shapes and types matter. Computes nothing: it runs
    on the meta device."""
    inputs, targets = task.inputs_and_targets({name: value.to("meta") for name, value in batch.items()})
    with torch.device("meta"):
        model = task.stage(0, 1)
        counter = FlopCounterMode(display=False)
        with counter:
            task.loss(model(inputs), targets).backward()
    return Work(sum(p.numel() for p in model.parameters()), float(counter.get_total_flops()))


@cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that one rank's device can reach: from the table, or measured once where it is a CPU. None where the
    table does not know the device."""
    if device.type == "cpu":
        return _measured(device)
    known = devices.of_product(torch.cuda.get_device_name(device))
    if known is None:
        return None
    if precision == "fp32" and known.tf32_flops and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"  # is what fp32 matrices are then multiplied in
    try:
        return known.peak_flops(precision)
    except ValueError:  # a format without hardware of its own
        return None


def _measured(device: torch.device) -> float:
    """The best of a few fp32 matrix products, with the threads that this rank has."""
    a = torch.ones(PEAK_SIZE, PEAK_SIZE, device=device)
    best_s = float("inf")
    for _ in range(PEAK_TRIES):
        began = time.perf_counter()
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * PEAK_SIZE**3 / best_s
