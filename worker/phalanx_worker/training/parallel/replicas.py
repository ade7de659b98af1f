"""Plain data parallelism: DistributedDataParallel, whose buckets of gradients are reduced while backward goes on (Li et
al. 2020, arXiv:2006.15704), and what may compress them on the wire."""

from __future__ import annotations

import torch.distributed as dist
from phalanx.recipes.parallel import Parallel
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

EVERYTHING = 1 << 40  # bytes of a bucket
POWERSGD_FIRST_STEP = 10  # exact steps before: early gradients compress badly (torch asks for at least 2)


class Replica(DistributedDataParallel):
    """A module as one of the group's replicas."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, parallel: Parallel) -> None:
        super().__init__(
            module,
            process_group=group,
            bucket_cap_mb=_bucket_bytes(parallel, group) / (1 << 20),  # pyright: ignore[reportArgumentType]  (fractions are fine)
            gradient_as_bucket_view=True,
        )
        self._powersgd = _powersgd(group, parallel.powersgd_rank) if parallel.compress == "powersgd" else None
        if self._powersgd:
            self.register_comm_hook(self._powersgd, powerSGD_hook.powerSGD_hook)
        elif parallel.compress != "none":
            self.register_comm_hook(group, _HALF[parallel.compress])

    def forget_left_out(self) -> None:
        """Drop what compression left out of the gradients so far, which it adds to the next. To be called by all
        replicas between the same steps: PowerSGD then begins again with random factors, from a generator that has drawn
        as often on each of them. Its count of steps stays, so none is exact again, nor are buckets built anew."""
        if self._powersgd:
            self._powersgd.error_dict.clear()
            self._powersgd.p_memory_dict.clear()
            self._powersgd.q_memory_dict.clear()


def _bucket_bytes(parallel: Parallel, group: dist.ProcessGroup) -> int:
    """PowerSGD starts its second and third exchange when the one before is done. Over gloo threads do that, each rank's
    in their own order where there are several buckets, and one rank's bucket meets another's: so there is one."""
    in_threads = parallel.compress == "powersgd" and dist.get_backend(group) == "gloo"
    return EVERYTHING if in_threads else parallel.bucket_bytes


_HALF = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def _powersgd(group: dist.ProcessGroup, rank: int) -> powerSGD_hook.PowerSGDState:
    """Low-rank gradients with error feedback (Vogels et al. 2019, arXiv:1905.13727)."""
    return powerSGD_hook.PowerSGDState(
        group, matrix_approximation_rank=rank, start_powerSGD_iter=POWERSGD_FIRST_STEP, min_compression_rate=1
    )
