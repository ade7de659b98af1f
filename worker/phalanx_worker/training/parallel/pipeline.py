"""Pipeline parallelism: each rank holds one stage of the layers, or several in turn, and a step's batch goes through in
microbatches, by a schedule of `torch.distributed.pipelining`: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B
(Narayanan et al. 2019, PipeDream) and interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from phalanx.recipes.parallel import Parallel
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

Loss = Callable[[Tensor, Tensor], Tensor]


def own_stages(parallel: Parallel, rank: int) -> list[int]:
    """The stages of a rank of the pipeline, first to last."""
    return list(range(rank, parallel.stages, parallel.pipeline))


def make_schedule(
    stages: Mapping[int, nn.Module], parallel: Parallel, group: dist.ProcessGroup, *, device: torch.device, loss: Loss
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """The schedule of this rank's stages. Gradients are summed over microbatches: `loss` has to divide by their
    number."""
    parts = [
        PipelineStage(module, index, parallel.stages, device=device, group=group) for index, module in stages.items()
    ]
    if parallel.schedule == "interleaved":
        return ScheduleInterleaved1F1B(list(parts), parallel.pieces, loss_fn=loss, scale_grads=False)
    single = ScheduleGPipe if parallel.schedule == "gpipe" else Schedule1F1B
    return single(parts[0], parallel.pieces, loss_fn=loss, scale_grads=False)
