"""Train a byte-level transformer language model on the Python standard library's own sources.

An ordinary DistributedDataParallel script: it runs under Phalanx, under torchrun, and alone. Under Phalanx it also
reports its progress, keeps checkpoints, resumes from the last one, and stops early when it is asked to.
"""

import argparse
import os
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import phalanx
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: `context` bytes in, one next-byte distribution per position out."""

    context: int
    width: int
    layers: int
    heads: int


class Block(nn.Module):
    """Pre-norm causal attention and a four times wider feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.project = nn.Linear(shape.width, shape.width)
        self.norm_feed = nn.LayerNorm(shape.width)
        self.feed = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norm_feed(x))


class ByteTransformer(nn.Module):
    """(batch, length) bytes as integers -> (batch, length, 256) logits of the byte that follows each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, shape.width)
        self.position = nn.Parameter(torch.randn(shape.context, shape.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def corpus(limit_bytes: int) -> torch.Tensor:
    """The sources of the standard library, one after another, as a vector of bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


def batch_of(data: torch.Tensor, *, batch: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows of `context` + 1 bytes: inputs and, one further, targets. (batch, context + 1), int64."""
    starts = torch.randint(len(data) - context - 1, (batch,), generator=generator)
    return torch.stack([data[start : start + context + 1] for start in starts]).long()


@dataclass
class Checkpoints:
    """Where the training state is kept: written whole, then renamed, so that a half-written one is never seen."""

    directory: Path | None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss: float) -> None:
        if self.directory is None:
            return
        path = self.directory / f"step-{step:06d}.pt"
        partial = path.with_suffix(".partial")
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
        partial.rename(path)
        phalanx.checkpoint(path, step=step, loss=loss)

    @staticmethod
    def load(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from: that of the checkpoint Phalanx names, or 0."""
        path = os.environ.get("PHALANX_RESUME_FROM")
        if not path:
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--corpus-bytes", type=int, default=1 << 20)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    return parser.parse_args()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    shape = Shape(context=args.context, width=args.width, layers=args.layers, heads=args.heads)
    inner = ByteTransformer(shape).to(device)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=args.lr)
    first = Checkpoints.load(inner, optimizer)
    model = DistributedDataParallel(inner, device_ids=[device.index] if device.type == "cuda" else None)
    directory = os.environ.get("PHALANX_CHECKPOINT_DIR")
    checkpoints = Checkpoints(Path(directory) if directory and rank == 0 else None)
    data = corpus(args.corpus_bytes)
    generator = torch.Generator().manual_seed(1000 * first + rank)
    if rank == 0:
        parameters = sum(p.numel() for p in inner.parameters())
        print(f"{parameters:,} parameters, {len(data):,} bytes of text, {world_size} ranks, from step {first}")

    step, loss = first, None  # an attempt that goes on from the last step has nothing left to do
    for step in range(first + 1, args.steps + 1):
        began = time.perf_counter()
        window = batch_of(data, batch=args.batch, context=args.context, generator=generator).to(device)
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimizer.step()
        step_time_s = time.perf_counter() - began
        if rank == 0:
            phalanx.report(
                step=step,
                total_steps=args.steps,
                loss=loss.item(),
                grad_norm=grad_norm.item(),
                lr=args.lr,
                step_time_s=step_time_s,
                tokens_per_s=args.batch * args.context * world_size / step_time_s,
            )
        if step % args.checkpoint_every == 0 or step == args.steps:
            checkpoints.save(step, inner, optimizer, loss.item())
        if stop_everywhere(device):
            checkpoints.save(step, inner, optimizer, loss.item())
            break
    if rank == 0:
        print(f"step {step}: " + (f"loss {loss.item():.3f}" if loss is not None else "nothing was left to do"))


def stop_everywhere(device: torch.device) -> bool:
    """Whether any rank was asked to stop: all ranks must leave the loop at the same step."""
    wish = torch.tensor(int(phalanx.should_stop()), device=device)
    dist.all_reduce(wish, op=dist.ReduceOp.MAX)
    return bool(wish.item())


def own_device() -> torch.device:
    """The GPU of this rank where every rank of the node has one, else (as on emulated nodes) the CPU. All ranks must
    come to the same, as it decides the backend: nodes of one job are alike."""
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def main() -> None:
    args = arguments()
    device = own_device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
