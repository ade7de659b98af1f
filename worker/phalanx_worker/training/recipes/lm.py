"""The `lm` recipe: a transformer, next-token cross-entropy, and the stream of tokens, put together.

Owns nothing but the putting together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from phalanx.recipes.lm import LmConfig, LmModel
from phalanx.recipes.parse import RecipeError
from torch import Tensor, nn

from phalanx_worker.training.checkpoint import open_checkpointer
from phalanx_worker.training.data.opening import vocab_size
from phalanx_worker.training.data.stream import open_stream
from phalanx_worker.training.loop import Batch, Checkpointer, Trainer
from phalanx_worker.training.mesh import World
from phalanx_worker.training.metrics.work import count_work
from phalanx_worker.training.models.transformer import Transformer, split, start
from phalanx_worker.training.parallel.layout import lay_out
from phalanx_worker.training.parallel.tensor import transformer_plan
from phalanx_worker.training.task import Task


def lm_task(shape: LmModel) -> Task:
    """The language model as a task: batches hold `tokens`, int64 (batch, length + 1)."""
    return Task(
        stage=partial(_stage, shape),
        start=partial(start, layers=shape.layers),
        inputs_and_targets=_inputs_and_targets,
        loss=_loss,
        blocks=_blocks,
        tensor_plan=transformer_plan,
    )


CONFIG = LmConfig


def make(
    config: LmConfig,
    world: World,
    *,
    batches: Iterator[Batch] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Trainer:
    """The trainer of this rank, on the data and with the checkpoints that `config` (placed) names, or with those given
    (`batches`: its parts of the global batches). Raises RecipeError."""
    task = lm_task(config.model)
    layout = lay_out(task, world, config.precision, seed=config.train.seed, accumulate=config.train.accumulate)
    global_batch = torch.empty(config.train.global_batch, config.data.seq_len + 1, dtype=torch.int64, device="meta")
    return Trainer(
        layout=layout,
        batches=batches or _open(config, world),
        train=config.train,
        optim=config.optim,
        precision=config.precision,
        checkpointer=checkpointer or open_checkpointer(config.checkpoint),
        checkpoint_every=config.checkpoint.every_steps,
        per_step={"tokens": config.train.global_batch * config.data.seq_len, "samples": config.train.global_batch},
        work=partial(count_work, task, {"tokens": global_batch}),
    )


def _open(config: LmConfig, world: World) -> Iterator[Batch]:
    symbols = vocab_size(config.data)
    if symbols and symbols > config.model.vocabulary:
        text = f"= {config.model.vocabulary} is less than the data's {symbols} symbols; use {symbols} or more"
        raise RecipeError("model.vocabulary", text)
    return open_stream(
        config.data,
        dp_rank=world.batch_rank,
        dp_size=config.parallel.batch_ways,
        batch=config.train.global_batch,
        seed=config.train.seed,
        device=world.device,
    )


def _stage(shape: LmModel, index: int, count: int) -> nn.Module:
    layers = split(shape.layers, count)[index]
    return Transformer(shape, layers=layers, embeds=index == 0, predicts=index == count - 1)


def _inputs_and_targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens = batch["tokens"]
    return tokens[:, :-1], tokens[:, 1:]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _blocks(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, Transformer)
    return list(model.blocks.values())
