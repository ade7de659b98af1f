"""How much memory the ranks of a training take at most, measured and told beside what was estimated.

Owns the measure. On a GPU it is what torch's allocator gave out, which is what the estimate is of. On a CPU, where
nobody keeps count of tensors, it is how far the process's resident memory rose over what it was before the model was
built: libraries that were loaded since, files that are mapped and memory that the allocator holds back are in it too.
It costs nothing in a step: both are counted anyhow, by torch and by Linux, and read twice in a training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import phalanx
import torch
import torch.distributed as dist
from phalanx import job
from phalanx.recipes.catalog import Config
from phalanx.recipes.memory import estimate

from phalanx_worker.training.loop import Facts

UPDATES = 2  # from the second on, a backward finds the optimizer's state in memory
MIB = 1 << 20
PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # of resident memory: proc_pid_clear_refs(5)


class Peak:
    """The most memory that this rank takes from now on; make it before the model."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._hidden_below = device, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                (PROCESS / "clear_refs").write_text(FORGET_PEAK)
            except OSError:  # not allowed, or no Linux: the peak of before hides those of now that are no higher
                self._hidden_below = resident_bytes("VmHWM")
            self._before = resident_bytes("VmRSS")

    def bytes(self) -> float:
        """NaN where it cannot be known; 0 where what the process held already was enough."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        peak = resident_bytes("VmHWM")
        return max(peak - self._before, 0.0) if peak > self._hidden_below else float("nan")


def resident_bytes(name: str) -> float:
    """`VmRSS`, resident memory now, or `VmHWM`, the most so far (proc_pid_status(5)); NaN where that is not told."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return float("nan")
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))  # in kB
    return next((1024.0 * int(size) for size in found), float("nan"))


@dataclass(frozen=True)
class Fullest:
    """The rank that takes most, and how much; `on_gpu` says of which memory."""

    rank: int
    peak_bytes: float
    on_gpu: bool

    def beside(self, estimated_bytes: int) -> str:
        """A sentence that puts it beside the estimate."""
        measured, estimated = (f"{size / MIB:,.4g} MiB" for size in (self.peak_bytes, estimated_bytes))
        if self.on_gpu:
            off = estimated_bytes / self.peak_bytes - 1
            return (
                f"A rank uses {measured} of GPU memory at most (rank {self.rank}); estimated {estimated} ({off:+.0%})."
            )
        return (
            f"A rank's resident memory rose by {measured} at most (rank {self.rank}) from before its model was built, "
            f"with libraries, mapped files and spare room; estimated {estimated} of tensors."
        )


def fullest(own_bytes: float, device: torch.device) -> Fullest | None:
    """Of all ranks, each of which calls it at the same step; None where none knows."""
    mine = torch.tensor([own_bytes], dtype=torch.float64, device=device)
    everyones = mine.new_empty(dist.get_world_size())
    dist.all_gather_single(everyones, mine)
    known = [(size, rank) for rank, size in enumerate(everyones.tolist()) if size == size]  # no NaN
    if not known:
        return None
    size, rank = max(known)
    return Fullest(rank, size, on_gpu=device.type == "cuda")


def unmeasured(estimated_bytes: int) -> str:
    return f"What a rank takes cannot be measured here; estimated {estimated_bytes / MIB:,.4g} MiB of tensors."


class MemoryReport:
    """A watcher of the loop, made before the model: tells the job once how much it takes, as soon as optimizers have
    their state; as metrics then, and again by `tell`, which is for after the last checkpoint."""

    def __init__(self, device: torch.device, config: Config) -> None:
        self._device, self._steps = device, config.train.steps
        self._estimated = estimate(config, dist.get_world_size(), on_gpu=device.type == "cuda").total
        self._peak = Peak(device)
        self._updates = 0
        self._is_told = False

    def after_backward(self, step: int, loss: float, grad_norm: float) -> bool:
        return True

    def after_step(self, facts: Facts) -> None:
        self._updates += facts.updated
        if self._updates >= UPDATES and not self._is_told:
            self.tell(facts.step)

    def tell(self, step: int) -> None:
        """What has been taken until now. Every rank calls it at the same step."""
        found, is_first, self._is_told = fullest(self._peak.bytes(), self._device), not self._is_told, True
        if dist.get_rank():
            return
        values = {"memory_peak_bytes": found.peak_bytes, "memory_peak_rank": found.rank} if found else {}
        phalanx.report(step=step, total_steps=self._steps, memory_estimated_bytes=self._estimated, **values)
        if is_first:
            job.mark("note", message=found.beside(self._estimated) if found else unmeasured(self._estimated))
