"""When a recipe tries its model on samples that it is not trained on, and which. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.recipes.parse import demand, demand_sizes


@dataclass(frozen=True)
class Evaluate:
    """Every `every` steps, and after the last, the model is tried on samples that it is not trained on: those of
    `paths`, or else a `share` of the data that is kept back (0: none, and no evaluation). `batch` is in samples over
    all ranks, rounded up to a multiple of the data-parallel ones; 0: as many as training computes at a time, so that
    what fits there fits here."""

    every: int = 500
    share: float = 0.1
    paths: tuple[str, ...] = ()
    batch: int = 0

    def __post_init__(self) -> None:
        demand_sizes(self, least=1, every=1 << 40)
        demand_sizes(self, least=0, batch=1 << 30)
        demand(0 <= self.share < 1, "share", self.share, "is a share; use a number in [0, 1)")

    @property
    def wanted(self) -> bool:
        return bool(self.share or self.paths)
