"""When a recipe saves its state, where to, and what is kept.

Owns the names and defaults only; what saves is `phalanx_worker.training.checkpoint`. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.recipes.parse import demand


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints by torch's Distributed Checkpoint: each is whole and verified, or it does not count."""

    url: str | None = None
    """A directory or fsspec URL that every node sees; else the job's own (`PHALANX_CHECKPOINT_DIR`); with neither,
    nothing is saved."""

    every_steps: int = 100
    """Steps between two; 0 saves only at the end and when the job is asked to stop."""

    keep_last: int = 3
    """Beside them, where `health.divergence` is rolled back, the one from before the loss passed its limit stays, as
    long as it is over that, and one that is to take its place."""

    keep_best: int = 0
    """How many of the best are kept beside the last ones."""

    best_metric: str = "loss"
    """The training loss at that step, or what an evaluation right after it found: for `lm` `held_out_loss` or
    `perplexity`, for `vision` `accuracy`, for `recsys` `held_out_loss`, `normalized_entropy` or `auc`."""

    best: Literal["lowest", "highest"] = "lowest"
    asynchronous: bool = True
    """Training goes on while a copy of the state is written."""

    verify: bool = True
    """Read every file again and compare its checksum before a checkpoint is resumed from; else only sizes."""

    def __post_init__(self) -> None:
        demand(self.every_steps >= 0, "every_steps", self.every_steps, "must be 0 (only at the end) or more")
        demand(self.keep_last > 0, "keep_last", self.keep_last, "must be at least 1: the last one is resumed from")
        demand(self.keep_best >= 0, "keep_best", self.keep_best, "must be 0 or more")
