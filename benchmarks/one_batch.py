"""The data of benchmarks that measure training alone: a rank's part of a random batch of tokens, again and again."""

from collections.abc import Iterator

import torch
from phalanx.recipes.lm import LmConfig
from phalanx_worker.training.mesh import World


def one_batch(config: LmConfig, world: World) -> Iterator[dict[str, torch.Tensor]]:
    """Of a placed configuration."""
    shape = (config.train.global_batch // config.parallel.batch_ways, config.data.seq_len + 1)
    generator = torch.Generator().manual_seed(world.batch_rank)
    tokens = torch.randint(config.model.vocabulary, shape, generator=generator)
    while True:
        yield {"tokens": tokens}
