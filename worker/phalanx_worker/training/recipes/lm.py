"""The `lm` recipe: a transformer, next-token cross-entropy, and the stream of tokens, put together.

Owns nothing but the putting together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from phalanx.recipes.lm import LmConfig, LmModel
from phalanx.recipes.parse import RecipeError
from torch import Tensor, nn

from phalanx_worker.training.checkpoint import open_checkpointer
from phalanx_worker.training.data.opening import vocab_size
from phalanx_worker.training.evaluation import Evaluation, HeldOut, open_samples
from phalanx_worker.training.loop import Batch, Checkpointer, Trainer
from phalanx_worker.training.mesh import World
from phalanx_worker.training.metrics.work import count_work
from phalanx_worker.training.models.transformer import Transformer, split, start
from phalanx_worker.training.parallel.layout import Layout, lay_out
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
    (`batches`: its parts of the global batches; then there is no evaluation). Raises RecipeError."""
    task = lm_task(config.model)
    layout = lay_out(task, world, config.precision, seed=config.train.seed, accumulate=config.train.accumulate)
    global_batch = torch.empty(config.train.global_batch, config.data.seq_len + 1, dtype=torch.int64, device="meta")
    evaluation = None
    if batches is None:
        _check_vocabulary(config)
        batches, held_out = open_samples(config, world)
        evaluation = Evaluation(partial(held_out_loss, layout, held_out), config) if held_out else None
    differ = layout.outer is not None  # replicas that train alone
    return Trainer(
        layout=layout,
        batches=batches,
        train=config.train,
        optim=config.optim,
        precision=config.precision,
        evaluation=evaluation,
        checkpointer=checkpointer or open_checkpointer(config.checkpoint, replicas_differ=differ),
        checkpoint_every=config.checkpoint.every_steps,
        per_step={"tokens": config.train.global_batch * config.data.seq_len, "samples": config.train.global_batch},
        work=partial(count_work, task, {"tokens": global_batch}),
    )


def _check_vocabulary(config: LmConfig) -> None:
    symbols = vocab_size(config.data)
    if symbols and symbols > config.model.vocabulary:
        text = f"= {config.model.vocabulary} is less than the data's {symbols} symbols; use {symbols} or more"
        raise RecipeError("model.vocabulary", text)


@torch.no_grad()
def held_out_loss(layout: Layout, held_out: HeldOut) -> Mapping[str, float]:
    """Of all ranks' held-out sequences: `held_out_loss` in nats per token, and `perplexity`."""
    (model,) = layout.modules
    total = torch.zeros(2, device=layout.world.device)
    for batch, counts in held_out:
        inputs, targets = layout.take(batch)
        losses = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten(), reduction="none")
        of_sequences = losses.view(targets.shape).mean(dim=1)
        total += torch.stack(((of_sequences * counts).sum(), counts.sum()))
    dist.all_reduce(total)  # ranks that share sequences have equal parts of each: the ratio stays
    loss = float(total[0] / total[1])
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


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
