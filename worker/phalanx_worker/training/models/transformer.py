"""A decoder-only transformer, plain: rotary embeddings (Su et al. 2021, arXiv:2104.09864), RMSNorm (Zhang and Sennrich
2019, arXiv:1910.07467), SwiGLU (Shazeer 2020, arXiv:2002.05202), grouped-query attention (Ainslie et al. 2023,
arXiv:2305.13245).

Owns the architecture and how each parameter starts. It knows nothing of ranks: a pipeline stage is the same class with
some of its layers, under the names that they have in the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from phalanx.recipes.lm import LmModel
from torch import Tensor, nn

INIT_STD = 0.02


class Transformer(nn.Module):
    """(batch, length) int64 tokens -> (batch, length, vocabulary) logits of the token that follows each.

    With only some `layers`, a stage of it: it takes and gives (batch, length, width) activations unless it `embeds`
    (the first) or `predicts` (the last)."""

    def __init__(self, shape: LmModel, *, layers: Iterable[int], embeds: bool = True, predicts: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width) if embeds else None
        self.blocks = nn.ModuleDict({str(layer): Block(shape) for layer in layers})
        self.norm = nn.RMSNorm(shape.width, eps=1e-6) if predicts else None
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False) if predicts else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to what it was given."""

    def __init__(self, shape: LmModel) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = Attention(shape)
        self.feed_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.feed = SwiGLU(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class WholeSequence:
    """Where a rank's tokens stand, and what they may look at, when it holds whole sequences."""

    def positions(self, length: int, device: torch.device) -> Tensor:
        """(length,) int64: where in the sequence each of this rank's tokens stands."""
        return torch.arange(length, device=device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of (batch, heads, length, size); keys and values may have fewer heads."""
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


class Attention(nn.Module):
    """Causal grouped-query attention. Heads are counted from the projections' own output, so that a rank which holds a
    part of them computes just those; `sequence` may be replaced where it holds a part of each sequence."""

    def __init__(self, shape: LmModel) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.base = shape.rotary_base
        self.sequence = WholeSequence()
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.key_heads * self.size, bias=False)
        self.value = nn.Linear(shape.width, shape.key_heads * self.size, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        turn = rotation(self.sequence.positions(query.shape[2], query.device), size=self.size, base=self.base)
        mixed = self.sequence.attend(rotate(query, turn), rotate(key, turn), value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads · size) -> (batch, heads, length, size)."""
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


class SwiGLU(nn.Module):
    """(…, width) -> (…, width) through a gated layer of `feed_width`."""

    def __init__(self, shape: LmModel) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.feed_width, bias=False)
        self.up = nn.Linear(shape.width, shape.feed_width, bias=False)
        self.down = nn.Linear(shape.feed_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotation(positions: Tensor, *, size: int, base: float) -> tuple[Tensor, Tensor]:
    """(length,) positions -> cosines and sines, (length, size / 2) each, fp32."""
    speeds = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = torch.outer(positions.float(), speeds)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + size / 2) of (batch, heads, length, size) by the angle of its position."""
    cos, sin = turn
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def start(name: str, whole: Tensor, generator: torch.Generator, *, layers: int) -> None:
    """Fill one whole parameter in place with its first values: ones for norms, else normal, the projections back into
    the residual stream smaller by √(2 · layers) (Radford et al. 2019, section 2.3)."""
    if whole.ndim == 1:
        whole.fill_(1.0)
        return
    into_residual = name.endswith(("attention.out.weight", "feed.down.weight"))
    std = INIT_STD / math.sqrt(2 * layers) if into_residual else INIT_STD
    whole.normal_(0.0, std, generator=generator)


def split(layers: int, stages: int) -> list[range]:
    """The layers of each stage, in order and as even as can be. The odd ones go to the stages in the middle: the first
    also embeds and the last also predicts. Raises ValueError for more stages than layers."""
    if stages > layers:
        raise ValueError(f"{layers} layers cannot make {stages} stages")
    small, odd = divmod(layers, stages)
    first_big = (stages - odd) // 2
    sizes = [small + (first_big <= stage < first_big + odd) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(begin, begin + size) for begin, size in zip(starts, sizes, strict=True)]
