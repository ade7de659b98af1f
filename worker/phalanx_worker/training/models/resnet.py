"""A residual network (He et al. 2016, arXiv:1512.03385), its stride in the 3 × 3 convolution, with group norm (Wu and
He 2018, arXiv:1803.08494): batch norm's statistics would depend on how a batch is cut over ranks.

Owns the architecture and how each parameter starts. It knows nothing of ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from phalanx.recipes.vision import Picture, Resnet
from torch import Tensor, nn

SMALL = 64  # pictures of at most so many pixels keep their resolution at the entrance


class ResidualNetwork(nn.Module):
    """(batch, channels, size, size) pixels -> (batch, classes) logits."""

    def __init__(self, shape: Resnet, picture: Picture, *, classes: int) -> None:
        super().__init__()
        self.small = picture.size <= SMALL
        side = 3 if self.small else 7
        self.stem = convolution(picture.channels, shape.width, side=side, stride=1 if self.small else 2)
        self.stem_norm = nn.GroupNorm(shape.groups, shape.width)
        self.blocks = nn.ModuleList(_blocks(shape))
        self.head = nn.Linear(shape.width * 2 ** (len(shape.depths) - 1) * shape.expansion, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(pixels)))
        if not self.small:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Block(nn.Module):
    """Two convolutions of 3 × 3, or a bottleneck of 1 × 1, 3 × 3 and 1 × 1, added to what was given."""

    def __init__(self, shape: Resnet, inside: int, *, given: int, stride: int) -> None:
        super().__init__()
        gives = inside * shape.expansion
        sides = (1, 3, 1) if shape.bottleneck else (3, 3)
        channels = (given, *[inside] * (len(sides) - 1), gives)
        strides = (1, stride, 1) if shape.bottleneck else (stride, 1)
        self.convolutions = nn.ModuleList(
            convolution(before, after, side=side, stride=step)
            for before, after, side, step in zip(channels, channels[1:], sides, strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(shape.groups, after) for after in channels[1:])
        changes = stride > 1 or given != gives
        self.short = convolution(given, gives, side=1, stride=stride) if changes else None
        self.short_norm = nn.GroupNorm(shape.groups, gives) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        for number, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            inner = norm(convolve(F.relu(inner) if number else inner))
        if self.short is not None and self.short_norm is not None:
            x = self.short_norm(self.short(x))
        return F.relu(x + inner)


def convolution(given: int, gives: int, *, side: int, stride: int) -> nn.Conv2d:
    """That keeps the resolution, but for the stride."""
    return nn.Conv2d(given, gives, kernel_size=side, stride=stride, padding=side // 2, bias=False)


def _blocks(shape: Resnet) -> list[Block]:
    blocks, given = [], shape.width
    for stage, depth in enumerate(shape.depths):
        inside = shape.width * 2**stage
        for number in range(depth):
            stride = 2 if stage and number == 0 else 1
            blocks.append(Block(shape, inside, given=given, stride=stride))
            given = inside * shape.expansion
    return blocks


def start(name: str, whole: Tensor, generator: torch.Generator) -> None:
    """Fill one whole parameter in place with its first values: ones for norms, zeros for biases, normal by fan-out for
    convolutions (He et al. 2015, arXiv:1502.01852) and small for the head."""
    if name.endswith("bias"):
        whole.zero_()
    elif whole.ndim == 1:
        whole.fill_(1.0)
    elif whole.ndim == 4:
        whole.normal_(0.0, math.sqrt(2 / (whole.shape[0] * whole.shape[2] * whole.shape[3])), generator=generator)
    else:
        whole.normal_(0.0, 0.01, generator=generator)
