"""A vision transformer, plain (Dosovitskiy et al. 2021, arXiv:2010.11929), without a class token: the mean over patches
is what is classified (Beyer et al. 2022, arXiv:2205.01580).

Owns the architecture and how each parameter starts. It knows nothing of ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from phalanx.recipes.vision import Picture, Vit
from torch import Tensor, nn

POSITION_STD = 0.5  # beside patches, whose embeddings are about 1
HEAD_STD = 0.02


class VisionTransformer(nn.Module):
    """(batch, channels, size, size) pixels -> (batch, classes) logits."""

    def __init__(self, shape: Vit, picture: Picture, *, classes: int) -> None:
        super().__init__()
        self.side = shape.patch
        self.embed = nn.Linear(picture.channels * shape.patch**2, shape.width)
        self.position = nn.Embedding(shape.patches(picture), shape.width)
        self.blocks = nn.ModuleDict({str(layer): Block(shape) for layer in range(shape.layers)})
        self.norm = nn.LayerNorm(shape.width)
        self.pool = MeanOverPatches()
        self.head = nn.Linear(shape.width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = squares(pixels, self.side)
        places = torch.arange(patches.shape[1], device=pixels.device)[None]
        x = self.embed(patches) + self.position(places)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.pool(self.norm(x)))


class Block(nn.Module):
    """Pre-norm attention and a GELU layer, each added to what it was given."""

    def __init__(self, shape: Vit) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.feed_norm = nn.LayerNorm(shape.width)
        self.feed = Feed(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class Attention(nn.Module):
    """Every patch sees all. Heads are counted from the projections' own output, so that a rank which holds a part of
    them computes just those."""

    def __init__(self, shape: Vit) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, patches, heads · size) -> (batch, heads, patches, size)."""
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


class Feed(nn.Module):
    """(…, width) -> (…, width) through a layer of `feed_width`."""

    def __init__(self, shape: Vit) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.feed_width)
        self.down = nn.Linear(shape.feed_width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MeanOverPatches(nn.Module):
    """(batch, patches, width) -> (batch, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def squares(pixels: Tensor, side: int) -> Tensor:
    """(batch, channels, height, width) -> (batch, patches, channels · side²), row by row."""
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def start(name: str, whole: Tensor, generator: torch.Generator, *, layers: int) -> None:
    """Fill one whole parameter in place with its first values: ones for norms, zeros for biases, else normal by fan-in,
    the projections back into the residual stream smaller by √(2 · layers)."""
    if name.endswith("bias"):
        whole.zero_()
    elif whole.ndim == 1:
        whole.fill_(1.0)
    else:
        whole.normal_(0.0, _std(name, whole.shape[1], layers), generator=generator)


def _std(name: str, fan_in: int, layers: int) -> float:
    if name.startswith(("position.", "head.")):
        return POSITION_STD if name.startswith("position.") else HEAD_STD
    into_residual = name.endswith(("attention.out.weight", "feed.down.weight"))
    return 1 / math.sqrt(fan_in * (2 * layers if into_residual else 1))
