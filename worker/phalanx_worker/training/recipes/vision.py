"""The `vision` recipe: ViT or ResNet, cross-entropy, and the stream of pictures, put together.

Owns nothing but the putting together and the tensor-parallel plan of a ViT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from phalanx.recipes.vision import Picture, VisionConfig, VisionModel
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from phalanx_worker.training.checkpoint import open_checkpointer
from phalanx_worker.training.data.augment import Augmented, Plain
from phalanx_worker.training.evaluation import Evaluation, HeldOut, open_samples
from phalanx_worker.training.loop import Batch, Checkpointer, Trainer
from phalanx_worker.training.mesh import World
from phalanx_worker.training.metrics.work import count_work
from phalanx_worker.training.models import resnet, vit
from phalanx_worker.training.parallel.layout import lay_out
from phalanx_worker.training.parallel.tensor import SEQUENCE
from phalanx_worker.training.task import Task

CONFIG = VisionConfig


def vision_task(model: VisionModel, picture: Picture) -> Task:
    """The classifier as a task: batches hold `image`, float32 (batch, channels, size, size), and `label`, int64."""
    is_vit = model.kind == "vit"
    return Task(
        stage=partial(_whole, model, picture),
        start=partial(vit.start, layers=model.vit.layers) if is_vit else resnet.start,
        inputs_and_targets=_inputs_and_targets,
        loss=_loss,
        blocks=_blocks,
        tensor_plan=vit_plan if is_vit else None,
    )


def make(
    config: VisionConfig,
    world: World,
    *,
    batches: Iterator[Batch] | None = None,
    checkpointer: Checkpointer | None = None,
) -> Trainer:
    """The trainer of this rank, on the data and with the checkpoints that `config` (placed) names, or with those given
    (`batches`: its parts of the global batches; then there is no evaluation). Raises RecipeError."""
    task = vision_task(config.model, config.picture)
    layout = lay_out(task, world, config.precision, seed=config.train.seed, accumulate=config.train.accumulate)
    evaluation = None
    if batches is None:
        size = config.picture.size
        batches, held_out = open_samples(config, world, transform=Augmented(config.augment, size), plain=Plain(size))
        evaluation = Evaluation(partial(top_1, layout.modules[0], held_out, world.device), config) if held_out else None
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
        per_step={"samples": config.train.global_batch},
        work=partial(count_work, task, _global_batch(config)),
    )


def _global_batch(config: VisionConfig) -> Batch:
    """Its shapes and types alone."""
    count, picture = config.train.global_batch, config.picture
    with torch.device("meta"):
        image = torch.empty(count, picture.channels, picture.size, picture.size)
        return {"image": image, "label": torch.empty(count, dtype=torch.int64)}


@torch.no_grad()
def top_1(model: nn.Module, held_out: HeldOut, device: torch.device) -> Mapping[str, float]:
    """{"accuracy": the share of held-out pictures whose likeliest class is theirs}, of all ranks."""
    right = torch.zeros(2, device=device)
    for batch, counts in held_out:
        hits = model(batch["image"]).argmax(dim=-1) == batch["label"]
        right += torch.stack(((hits & counts).sum(), counts.sum()))
    dist.all_reduce(right)  # ranks that share their samples all count them: the ratio stays
    return {"accuracy": float(right[0] / right[1])}


def _whole(model: VisionModel, picture: Picture, _index: int, _count: int) -> nn.Module:
    if model.kind == "vit":
        return vit.VisionTransformer(model.vit, picture, classes=model.classes)
    return resnet.ResidualNetwork(model.resnet, picture, classes=model.classes)


def _inputs_and_targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["label"]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _blocks(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, vit.VisionTransformer):
        return list(model.blocks.values())
    assert isinstance(model, resnet.ResidualNetwork)
    return list(model.blocks)


def vit_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """How a ViT is cut: as the language model is, `parallel/tensor.py`, with patches for a sequence."""
    assert isinstance(model, vit.VisionTransformer)
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "position": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "norm": SequenceParallel(),
        "pool": _gathered(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in model.blocks:
        plan |= {f"blocks.{layer}.{name}": style for name, style in _block_plan().items()}
    return plan


def _block_plan() -> dict[str, ParallelStyle]:
    return {
        "attention_norm": SequenceParallel(),
        "attention": _gathered(),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=SEQUENCE),
        "feed_norm": SequenceParallel(),
        "feed": _gathered(),
        "feed.up": ColwiseParallel(),
        "feed.down": RowwiseParallel(output_layouts=SEQUENCE),
    }


def _gathered() -> PrepareModuleInput:
    return PrepareModuleInput(input_layouts=(SEQUENCE,), desired_input_layouts=(Replicate(),))
