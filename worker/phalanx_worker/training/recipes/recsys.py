"""The `recsys` recipe: tables and layers, the loss of click or no click, and the stream of lines, put together.

Owns the putting together and what is said of the predictions on held-out lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from phalanx.recipes.recsys import TABLES, RecsysConfig
from torch import Tensor

from phalanx_worker.training import precision
from phalanx_worker.training.checkpoint import open_checkpointer
from phalanx_worker.training.evaluation import Evaluation, HeldOut, open_samples
from phalanx_worker.training.loop import Batch, Checkpointer, Trainer
from phalanx_worker.training.mesh import World
from phalanx_worker.training.metrics.work import Work
from phalanx_worker.training.models.dlrm import Dense, Tables, start_dense
from phalanx_worker.training.parallel.tables import TablesLayout, share_out

CONFIG = RecsysConfig


def make(
    config: RecsysConfig,
    world: World,
    *,
    batches: Iterator[Batch] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Trainer:
    """The trainer of this rank, on the data and with the checkpoints that `config` (placed) names, or with those given
    (`batches`: its parts of the global batches; then there is no evaluation). Raises RecipeError."""
    layout = _lay_out(config, world)
    evaluation = None
    if batches is None:
        batches, held_out = open_samples(config, world)
        evaluation = Evaluation(partial(examine, layout, held_out), config) if held_out else None
    return Trainer(
        layout=layout,
        batches=batches,
        train=config.train,
        optim=config.optim,
        precision=config.precision,
        evaluation=evaluation,
        checkpointer=checkpointer or open_checkpointer(config.checkpoint),
        checkpoint_every=config.checkpoint.every_steps,
        per_step={"samples": config.train.global_batch},
        work=partial(_count_work, config),
    )


def _count_work(config: RecsysConfig) -> Work:
    """A multiply and an add per weight and sample, forward and twice that backward; and the products of all pairs, of
    which each is computed twice."""
    model = config.model
    per_sample = 6 * (model.dense_parameters + (TABLES + 1) ** 2 * model.dim)
    return Work(model.dense_parameters + model.table_parameters, float(config.train.global_batch * per_sample))


def _lay_out(config: RecsysConfig, world: World) -> TablesLayout:
    with torch.device("meta"):
        tables, dense = Tables(config.model), Dense(config.model)
    share_out(tables, world, seed=config.train.seed)
    dense.to_empty(device=world.device)
    start_dense(dense, torch.Generator(world.device).manual_seed(config.train.seed))
    precision.use_autocast(dense, config.precision, world.device)
    return TablesLayout(tables, dense, world, loss=_loss, accumulate=config.train.accumulate)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels)


@torch.no_grad()
def examine(layout: TablesLayout, held_out: HeldOut) -> Mapping[str, float]:
    """Of all ranks' held-out lines: `held_out_loss` in nats, `normalized_entropy` and `auc`."""
    dense, tables = layout.modules
    answers = []
    for batch, counts in held_out:
        logits = dense(batch["dense"], tables(batch["categories"])).float()
        answers.append(torch.stack((logits, batch["label"], counts.float()), dim=1))
    logits, labels, counts = _of_all_ranks(torch.cat(answers)).unbind(1)
    return judged(logits[counts > 0].double(), labels[counts > 0].double())


def judged(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Normalized entropy is the loss over that of always saying the share of clicks (He et al. 2014, ADKDD, section
    3); nan where there are only clicks, or none."""
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    base = torch.logit(labels.mean())
    entropy = F.binary_cross_entropy_with_logits(base.expand_as(labels), labels)
    return {"held_out_loss": float(loss), "normalized_entropy": float(loss / entropy), "auc": auc(logits, labels)}


def auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a random click has a higher score than a random other line, ties counted half: from the sum of
    ranks (Mann and Whitney 1947). nan where there are only clicks, or none."""
    _, places, sizes = scores.unique(return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2).double()[places]
    clicks = labels.sum().double()
    above = (ranks * labels).sum() - clicks * (clicks + 1) / 2
    return float(above / (clicks * (len(labels) - clicks)))


def _of_all_ranks(values: Tensor) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)
