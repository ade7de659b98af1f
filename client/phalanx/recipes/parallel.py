"""How a model is laid over the ranks of a gang: the sizes of the mesh and the switches of each technique.

Owns the arithmetic of layouts (what a world size is filled with, what the sizes must divide). Knows no model and no
torch. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isqrt, prod
from typing import Annotated, Literal

from phalanx.recipes.parse import RecipeError, demand, demand_sizes

Schedule = Literal["gpipe", "1f1b", "interleaved"]
Recompute = Literal["none", "selective", "full"]
Compress = Literal["none", "bf16", "fp16", "powersgd"]

AXES = ("data", "shard", "tensor", "pipeline", "context")


@dataclass(frozen=True)
class LocalSteps:
    """Infrequent synchronisation: replicas take `every` steps of their own, then an outer optimizer (SGD with Nesterov
    momentum) moves the common parameters towards their mean. DiLoCo, Douillard et al. 2023, arXiv:2311.08105; with
    `outer_lr` 1 and `outer_momentum` 0 it is local SGD (Stich 2018, arXiv:1805.09767). A single replica takes the outer
    steps too. `every` 0 switches it off."""

    every: int = 0
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        demand(self.every >= 0, "every", self.every, "is negative; use 0 (off) or more")
        demand_sizes(self, least=0, every=1 << 40)
        demand(self.outer_lr > 0, "outer_lr", self.outer_lr, "is not positive; use 0.7")
        demand(0 <= self.outer_momentum < 1, "outer_momentum", self.outer_momentum, "is not in [0, 1); use 0.9")


@dataclass(frozen=True)
class Parallel:
    """The layout. `data` × `shard` × `tensor` × `pipeline` × `context` is the world size; `data: auto` takes the rest.

    Both `data` and `shard` divide the batch: `data` keeps replicas (DDP), `shard` splits parameters, gradients and
    optimizer state too (FSDP2); both above 1 are hybrid sharding.
    """

    data: int | Literal["auto"] = "auto"
    shard: int = 1
    tensor: int = 1  # with sequence parallelism
    pipeline: int = 1
    context: int = 1  # parts that each sequence is cut into
    schedule: Schedule = "1f1b"
    microbatches: int | Literal["auto"] = "auto"  # of a pipeline, per step; auto: two per stage
    stages_per_rank: int = 2  # of the interleaved schedule
    recompute: Recompute = "none"  # of activations in backward
    offload: bool = False  # sharded parameters, gradients and optimizer state live in host memory
    reshard: bool = True  # free gathered parameters after forward, and gather them again for backward
    compress: Compress = "none"  # of gradients on the wire, by a DDP communication hook
    powersgd_rank: int = 4
    bucket_bytes: Annotated[int, "bytes"] = 25 << 20  # of gradients that DDP reduces together
    local: LocalSteps = field(default_factory=LocalSteps)

    def __post_init__(self) -> None:
        counts = dict.fromkeys((*AXES, "microbatches", "powersgd_rank"), 1 << 20)
        demand_sizes(self, least=1, **counts, stages_per_rank=4096, bucket_bytes=1 << 40)
        self._check_switches()

    def _check_switches(self) -> None:
        demand(
            self.compress == "none" or self.whole_parameters,
            "compress",
            self.compress,
            "works with plain replicas (DDP) only; use compress = none, or data alone",
        )
        demand(
            not self.local.every or self.compress == "none",
            "compress",
            self.compress,
            "has no gradients to compress when local.every > 0; use compress = none",
        )

        demand(
            not self.local.every or self.context == 1,
            "context",
            self.context,
            "needs gradients exchanged in every step; use context = 1 or local.every = 0",
        )

    @property
    def fully_sharded(self) -> bool:
        """Whether shards and replicas go through FSDP2. Replicas do so too where DDP cannot carry them: it takes no
        tensor-parallel parameters (DTensors) and no offload, and under an interleaved pipeline it loses count of its
        buckets (torch 2.13)."""
        replicas = (self.data not in (1, "auto") or self.context > 1) and not self.local.every
        return self.shard > 1 or self.offload or (replicas and (self.tensor > 1 or self.pipeline > 1))

    @property
    def whole_parameters(self) -> bool:
        """Whether parameters are plain tensors: neither sharded nor cut."""
        return not self.fully_sharded and self.tensor == 1

    @property
    def batch_ways(self) -> int:
        """Into how many parts the global batch is divided. Needs `data` filled in."""
        return self._data * self.shard

    @property
    def stages(self) -> int:
        """Into how many parts the layers are divided."""
        return self.pipeline * (self.stages_per_rank if self.pipeline > 1 and self.schedule == "interleaved" else 1)

    @property
    def pieces(self) -> int:
        """Microbatches per step and rank: 1 without a pipeline."""
        if self.pipeline == 1:
            return 1
        return 2 * self.stages if self.microbatches == "auto" else self.microbatches

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the mesh: pipeline, replicas (data × context), shard, tensor. Needs `data` filled in."""
        return (self.pipeline, self._data * self.context, self.shard, self.tensor)

    @property
    def _data(self) -> int:
        assert self.data != "auto", "filled() comes first"
        return self.data

    def filled(self, world_size: int) -> Parallel:
        """The same with `data` as a number, such that the product is `world_size`. Raises `RecipeError`."""
        others = prod((self.shard, self.tensor, self.pipeline, self.context))
        if self.data == "auto":
            if world_size % others:
                text = f"shard × tensor × pipeline × context = {others} does not divide the {world_size} ranks"
                raise RecipeError("parallel", f"has no room: {text}; use sizes whose product does")
            return replace(self, data=world_size // others)
        if self.data * others != world_size:
            text = f"data × shard × tensor × pipeline × context = {self.data * others}, and the job has {world_size}"
            raise RecipeError("parallel", f"does not fit: {text} ranks; use data = auto or other sizes")
        return self


def divisors(number: int) -> str:
    """The numbers that divide `number`, for a message: `1, 2, 4 or 8`."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    found = [str(n) for n in sorted({*small, *(number // n for n in small)})]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
