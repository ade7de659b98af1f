"""Computes a suspicious step again, to tell a bad batch from a bad machine: the same parameters, batch and random
numbers have to give the same again.

Owns the comparison, bitwise for a rank's own loss. The gradient's norm is compared bitwise where a CPU computes;
kernels of GPUs add up in any order, so there it may differ by a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isclose, isfinite

import torch
import torch.distributed as dist
from torch import Tensor, nn

GPU_TOLERANCE = 1e-3  # of the norm, relative


@dataclass(frozen=True)
class Pulse:
    """What a step has come to before its update. `loss` (mean of the global batch), `bad_ranks` (how many have a loss
    or gradient that is not finite, which a loss scale does not explain), `finite` (loss and gradient are, on all ranks)
    and `stop` (any rank was asked to) are the same on every rank; `own_loss` is this rank's part, None where it has
    none; `norm` is the gradient's, a scalar on the device."""

    step: int
    loss: float
    own_loss: Tensor | None
    norm: Tensor
    bad_ranks: int = 0
    finite: bool = True
    stop: bool = False


Again = Callable[[], Pulse]
"""Computes this step's loss and gradients anew; every rank calls it together."""


class Dice:
    """The state of the random numbers at the start of a step, so that dropout falls the same again; nothing for models
    without any."""

    def __init__(self, device: torch.device, modules: Iterable[nn.Module]) -> None:
        self.device = device
        """That computes; with `parallel.offload` gradients lie elsewhere."""
        self._thrown = any("dropout" in type(part).__name__.lower() for module in modules for part in module.modules())
        self.keep()

    def keep(self) -> None:
        if self._thrown:
            self._cpu = torch.get_rng_state()
            self._gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def restore(self) -> None:
        if self._thrown:
            torch.set_rng_state(self._cpu)
            if self._gpu is not None:
                torch.cuda.set_rng_state(self._gpu, self.device)


def recompute(pulse: Pulse, again: Again, dice: Dice) -> tuple[Pulse, list[int], bool]:
    """The step once more: its new pulse, which ranks had another loss of their own than before, and whether anything at
    all was different. The same on every rank."""
    dice.restore()
    second = again()
    loss_differs = not _same(pulse.own_loss, second.own_loss)
    norm_differs = not _close(float(pulse.norm), float(second.norm), exact=dice.device.type == "cpu")
    mine = torch.tensor([loss_differs, norm_differs], dtype=torch.int32, device=pulse.norm.device)
    everyones = mine.new_empty(dist.get_world_size() * 2)
    dist.all_gather_single(everyones, mine)
    rows = everyones.view(-1, 2).tolist()
    return second, [rank for rank, row in enumerate(rows) if row[0]], any(any(row) for row in rows)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first.view(torch.int32), second.view(torch.int32))  # bits: NaN is the same as itself


def _close(first: float, second: float, *, exact: bool) -> bool:
    if not isfinite(first) and not isfinite(second):
        return True
    return first == second if exact else isclose(first, second, rel_tol=GPU_TOLERANCE)
