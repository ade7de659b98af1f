"""How much memory each rank of a recipe needs, before it starts: an estimate from the configuration alone.

Owns what is divided by which technique: parameters, gradients and optimizer state by sharding (Rajbhandari et al. 2020,
ZeRO, arXiv:1910.02054, section 3), activations by tensor, sequence and pipeline parallelism and recomputation
(Korthikanti et al. 2022, arXiv:2205.05198). Not in it: temporary tensors within an operation, the allocator's
fragmentation, and what CUDA and NCCL take for themselves; `RESERVE` stands for these. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

from phalanx.recipes import activations, weights
from phalanx.recipes.activations import Kept, Widths
from phalanx.recipes.catalog import Config
from phalanx.recipes.devices import GIB, Device
from phalanx.recipes.lm import LmConfig
from phalanx.recipes.optim import Optim
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.precision import Precision
from phalanx.recipes.recsys import RecsysConfig
from phalanx.recipes.vision import VisionConfig
from phalanx.recipes.weights import Alike, Model, Unit

FP32 = 4
RESERVE = 0.1  # of a device, that nothing of this may take
LOGITS_ALIVE = 3  # the log-softmax, its gradient and that of the logits, as backward begins


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most. `copies` are parameters in another form, while they are computed with:
    gathered from all shards, or cast by autocast; the gradients of what is gathered; and of all, what PowerSGD left
    out."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    copies: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def estimate(config: Config, world_size: int, *, on_gpu: bool = True) -> Memory:
    """Of a gang of `world_size` ranks. Raises RecipeError where it cannot run the recipe."""
    placed = config.placed(world_size)
    if isinstance(placed, RecsysConfig):
        return _recsys(placed, world_size)
    model = _model(placed)
    ranks = _unlike_ranks(sum(block.times for block in model.blocks), placed.parallel)
    return max((_stage(placed, model, rank, on_gpu) for rank in ranks), key=lambda memory: memory.total)


def _stage(config: LmConfig | VisionConfig, model: Model, rank: int, on_gpu: bool) -> Memory:
    """Of one rank of the pipeline (0 of 1 where there is none)."""
    parallel = config.parallel
    blocks = _own_blocks(model, parallel, rank)
    first, last = rank == 0, rank == parallel.pipeline - 1
    ends = (*(model.first if first else ()), *(model.last if last else ()))
    parts = [each.part(tensor=parallel.tensor, shard=_shards(parallel)) for each in (Alike(ends), *blocks)]
    here = 0 if parallel.offload else 1  # or in the host's memory
    held = FP32 * sum(part.count for part in parts) * here
    outer = 2 * held if parallel.local.every else 0  # what replicas have in common, and the outer momentum
    waiting, logits = _activations(config, blocks, rank, _widths(config.precision, parallel, on_gpu))
    return Memory(
        parameters=held,
        gradients=held + _whole_gradients(ends, parallel),
        optimizer=_optimizer_bytes(config.optim, parts) * here + outer,
        activations=waiting,
        logits=logits,
        copies=_copies(config, Model(blocks, first=ends)) + _left_out(held, parallel),
    )


def _model(config: LmConfig | VisionConfig) -> Model:
    if isinstance(config, LmConfig):
        return weights.lm(config.model)
    if config.model.kind == "vit":
        return weights.vit(config.model.vit, config.picture, config.model.classes)
    return weights.resnet(config.model.resnet, config.picture, config.model.classes)


def _shards(parallel: Parallel) -> int:
    return parallel.shard if parallel.fully_sharded else 1


def _big_stages(layers: int, parallel: Parallel) -> range:
    """The stages with one layer more than the others. As `models/transformer.py` splits layers: evenly, the odd ones to
    the stages in the middle."""
    odd = layers % parallel.stages
    first = (parallel.stages - odd) // 2
    return range(first, first + odd)


def _own_blocks(model: Model, parallel: Parallel, rank: int) -> tuple[Alike, ...]:
    """The blocks of all of the rank's stages; models whose blocks differ have no pipeline."""
    if parallel.pipeline == 1:
        return model.blocks
    (alike,) = model.blocks
    small, big = alike.times // parallel.stages, _big_stages(alike.times, parallel)
    mine = range(rank, parallel.stages, parallel.pipeline)
    return (replace(alike, times=sum(small + (stage in big) for stage in mine)),)


def _unlike_ranks(layers: int, parallel: Parallel) -> list[int]:
    """Ranks of the pipeline one of which needs most: both ends, and of those between with as many layers the first, for
    which most microbatches wait. How many layers a rank has changes only where the big stages begin and end."""
    size, big = parallel.pipeline, _big_stages(layers, parallel)
    return sorted({0, min(1, size - 1), big.start % size, big.stop % size, size - 1})


def _whole_gradients(own: Unit, parallel: Parallel) -> int:
    """What gradients of looked-up tables take more than their parts, in bytes; FSDP makes parts of them."""
    if parallel.fully_sharded:
        return 0
    tables = [weight for weight in own if weight.looked_up]
    return FP32 * sum(table.count - table.part(tensor=parallel.tensor, shard=1).count for table in tables)


def _optimizer_bytes(optim: Optim, parts: Sequence[Alike]) -> int:
    """adamw and lamb keep two moments, sgd its momentum; adafactor a row and a column of each matrix (Shazeer and Stern
    2018, arXiv:1804.04235)."""
    count = sum(part.count for part in parts)
    if optim.name == "adafactor":
        return FP32 * sum(part.times * _factors(weight.shape) for part in parts for weight in part.unit)
    return FP32 * count * (2 if optim.name in ("adamw", "lamb") else int(optim.momentum > 0))


def _factors(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def _copies(config: LmConfig | VisionConfig, own: Model) -> int:
    """Sharded: what is outside the blocks stays gathered through a step, and of the blocks two are at a time, the one
    that is computed and the next, with the gradients of one; all of them, where they are not given up in between or
    gradients add up. Else autocast's copies of the matrices."""
    parallel, bytes_each = config.parallel, FP32 if config.precision.compute == "fp32" else 2
    whole = [block.part(tensor=parallel.tensor, shard=1) for block in own.blocks]
    ends = Alike(own.first).part(tensor=parallel.tensor, shard=1)
    if not parallel.fully_sharded:
        matrices = [(each.times, weight) for each in (ends, *whole) for weight in each.unit if len(weight.shape) > 1]
        return 0 if bytes_each == FP32 else bytes_each * sum(times * weight.count for times, weight in matrices)
    every, largest = sum(block.count for block in whole), max(weights.count(block.unit) for block in whole)
    outside = ends.count
    stays = not parallel.reshard or parallel.pipeline > 1
    gathered = outside + (every if stays else min(every, 2 * largest))
    piled_up = config.train.accumulate > 1 or parallel.pipeline > 1
    return bytes_each * gathered + (FP32 * (every + outside) if piled_up else bytes_each * (largest + outside))


def _left_out(gradients: int, parallel: Parallel) -> int:
    """PowerSGD keeps what it has not sent of each gradient, for the next step (Vogels et al. 2019, arXiv:1905.13727,
    section 3)."""
    return gradients if parallel.compress == "powersgd" and parallel.sizes[1] > 1 else 0


def _widths(precision: Precision, parallel: Parallel, on_gpu: bool) -> Widths:
    """Autocast leaves the residual stream in fp32; FSDP's mixed precision does not. What fp8 layers keep
    for backward is their bf16 input."""
    if precision.compute == "fp32":
        return Widths(stream=FP32, product=FP32, copies=False, fused_norms=on_gpu, masks=not on_gpu)
    stream = 2 if parallel.fully_sharded else FP32
    return Widths(stream=stream, product=2, copies=not parallel.fully_sharded, fused_norms=on_gpu, masks=not on_gpu)


def _activations(
    config: LmConfig | VisionConfig, blocks: Sequence[Alike], rank: int, widths: Widths
) -> tuple[int, int]:
    """Bytes of what waits for backward when most of it does, and of logits."""
    parallel = config.parallel
    layers = sum(block.times for block in blocks)
    samples = config.train.global_batch // (parallel.batch_ways * config.train.accumulate * parallel.pieces)
    if isinstance(config, LmConfig):
        length = config.data.seq_len // parallel.context
        part = activations.Sequences(samples, length, config.data.seq_len, parallel.tensor)
        return _waiting(activations.lm(config.model, part, widths), parallel, layers, rank)
    model, picture = config.model, config.picture
    if model.kind == "vit":
        sizes = {"pictures": samples, "tensor": parallel.tensor, "widths": widths}
        return _waiting(activations.vit(model.vit, picture, model.classes, **sizes), parallel, layers, rank)
    every = activations.resnet(model.resnet, picture, model.classes, pictures=samples, widths=widths)
    return _residual_waiting(every, parallel)


def _waiting(kept: Kept, parallel: Parallel, layers: int, rank: int) -> tuple[int, int]:
    flying, stages = in_flight(parallel, rank), parallel.stages // parallel.pipeline
    stage = kept.blocks(layers, parallel.recompute) / stages
    again = kept.again(parallel.recompute)
    if parallel.pipeline == 1:
        return round(stage) + kept.first + max(kept.last, again), LOGITS_ALIVE * kept.logits
    if rank == 0:  # and the forward by which torch 2.13 finds shapes out: its first stage is kept
        return round((stage + kept.first / stages) * (flying + 1)) + again, 0
    if rank < parallel.pipeline - 1:
        return round(stage * flying) + again, 0
    ends = parallel.pieces if parallel.schedule == "gpipe" else 1
    return round(stage * flying) + max(ends * kept.last, again), (ends + LOGITS_ALIVE - 1) * kept.logits


def in_flight(parallel: Parallel, rank: int) -> int:
    """Microbatches (of one of the rank's stages each) whose activations wait at once: all of them under GPipe; under
    1F1B as many as there are stages from here on (Narayanan et al. 2019, section 3.2); interleaved, those of the
    warm-up and one more (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""
    if parallel.pipeline == 1:
        return 1
    behind = parallel.pipeline - rank - 1
    if parallel.schedule == "gpipe":
        return parallel.pieces
    if parallel.schedule == "1f1b":
        return min(parallel.pieces, behind + 1)
    stages = parallel.stages_per_rank
    return min(parallel.pieces * stages, 2 * behind + (stages - 1) * parallel.pipeline + 1)


def _residual_waiting(every: tuple[tuple[Kept, int], ...], parallel: Parallel) -> tuple[int, int]:
    recompute = "none" if parallel.recompute == "none" else "full"  # nothing of a convolution counts as costly
    again = max(kept.again(recompute) for kept, _ in every)
    waiting = sum(kept.blocks(times, recompute) + kept.first for kept, times in every)
    end, _ = every[-1]
    return waiting + max(again, end.last), LOGITS_ALIVE * end.logits


def _recsys(config: RecsysConfig, world_size: int) -> Memory:
    """Layers are replicated, rows of tables shared out."""
    tables = weights.recsys_tables(config.model).part(tensor=1, shard=world_size)
    layers = weights.recsys_dense(config.model)
    parts = Alike((*layers, tables))
    samples = config.train.global_batch // (config.parallel.batch_ways * config.train.accumulate)
    widths = _widths(config.precision, config.parallel, on_gpu=True)
    matrices = weights.count(weight for weight in layers if len(weight.shape) > 1)
    cast = widths.product * matrices if widths.copies else 0
    return Memory(
        parameters=FP32 * parts.count,
        gradients=FP32 * parts.count,
        optimizer=_optimizer_bytes(config.optim, [parts]),
        activations=activations.recsys(config.model, samples=samples, widths=widths),
        logits=0,
        copies=cast + _left_out(FP32 * weights.count(layers), config.parallel),
    )


def verdict(config: Config, world_size: int, device: Device) -> str:
    """`fits on h100-80gb: 31 of 80 GiB`, or `does not fit on …: needs 96 of 80 GiB; use parallel.shard = 4, or …`.
    Raises RecipeError where the gang cannot run the recipe."""
    return verdicts(config, world_size, estimate(config, world_size), [device])[0]


def verdicts(config: Config, world_size: int, memory: Memory, devices: Sequence[Device]) -> list[str]:
    """One on each device, of a recipe that needs so much memory: what would help is worked out once for all."""
    short = any(not fits(memory, device) for device in devices)
    helps = [(name, estimate(other, world_size)) for name, other in remedies(config, world_size)] if short else []
    return [_verdict(memory, device, [name for name, less in helps if fits(less, device)]) for device in devices]


def _verdict(memory: Memory, device: Device, helping: list[str]) -> str:
    if fits(memory, device):
        return f"fits on {device.name}: {_gib(memory.total)} of {_gib(device.memory_bytes)} GiB"
    said = f"does not fit on {device.name}: needs {_gib(memory.total)} of {_gib(device.memory_bytes)} GiB"
    return f"{said}; use {', or '.join(helping[:2])}" if helping else f"{said}, and no switch helps; use more ranks"


def fits(memory: Memory, device: Device) -> bool:
    """Whether it leaves the device its reserve."""
    return memory.total <= (1 - RESERVE) * device.memory_bytes


def remedies(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    """What may be changed to need less, the cheapest first: each with the line that does it. The global batch stays as
    it is."""
    if isinstance(config, RecsysConfig):
        return
    for shard in (0, *(2**k for k in range(1, world_size.bit_length()))):
        for recompute in ("none", "selective", "full"):
            changes = {"data": "auto", "shard": shard} if shard else {}
            changes |= {"recompute": recompute} if recompute != "none" else {}
            other = replace(config, parallel=replace(config.parallel, **changes)) if changes else None
            if other is not None and _can_run(other, world_size):
                named = {name: value for name, value in changes.items() if name != "data"}
                yield " with ".join(f"parallel.{name} = {value}" for name, value in named.items()), other


def _can_run(config: Config, world_size: int) -> bool:
    try:
        config.placed(world_size)
    except RecipeError:
        return False
    return True


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}" if size < 10 * GIB else f"{size / GIB:.0f}"
