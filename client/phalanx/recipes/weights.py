"""The parameters of each recipe's model as shapes, in the units that a layout gathers, and how much of them a rank
holds. Pure arithmetic; standard library only.

Owns a second account of what the models in `phalanx_worker.training.models` are made of; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from phalanx.recipes.lm import LmModel
from phalanx.recipes.recsys import RecsysModel
from phalanx.recipes.vision import Picture, Resnet, Vit

RESNET_SMALL = 64  # pixels: up to here the entrance keeps the resolution


@dataclass(frozen=True)
class Weight:
    """One parameter. Tensor-parallel ranks share dimension `cut` out (None: each has it all). Of a table that is
    `looked_up`, they share the rows out, but each has the gradient of all (as torch 2.13's DTensor leaves it)."""

    shape: tuple[int, ...]
    cut: int | None = None
    looked_up: bool = False

    @property
    def count(self) -> int:
        return prod(self.shape)

    def part(self, *, tensor: int, shard: int) -> Weight:
        """What the rank with the most of it holds, where tensor-parallel ranks cut and sharding ranks share dimension 0
        out."""
        sizes = list(self.shape)
        if self.cut is not None:
            sizes[self.cut] = -(-sizes[self.cut] // tensor)
        sizes[0] = -(-sizes[0] // shard)
        return replace(self, shape=tuple(sizes))


Unit = tuple[Weight, ...]


@dataclass(frozen=True)
class Alike:
    """So many units in a row that are all as this one: what a model costs to estimate does not grow with its depth."""

    unit: Unit
    times: int = 1

    @property
    def count(self) -> int:
        """Parameters of them all."""
        return self.times * count(self.unit)

    def part(self, *, tensor: int, shard: int) -> Alike:
        """What the rank with the most of each weight holds."""
        return replace(self, unit=tuple(weight.part(tensor=tensor, shard=shard) for weight in self.unit))


@dataclass(frozen=True)
class Model:
    """`blocks` are gathered one by one; `first` and `last` are what comes before and after them, in one pipeline stage
    with the outermost blocks."""

    blocks: tuple[Alike, ...]
    first: Unit = ()
    last: Unit = ()


def count(weights: Iterable[Weight]) -> int:
    """Parameters."""
    return sum(weight.count for weight in weights)


def lm(model: LmModel) -> Model:
    """`models/transformer.py`."""
    width, feed = model.width, model.feed_width
    keys = model.key_heads * (width // model.heads)
    norms = (Weight((width,)), Weight((width,)))
    attention = (
        Weight((width, width), 0),
        Weight((keys, width), 0),
        Weight((keys, width), 0),
        Weight((width, width), 1),
    )
    swiglu = (Weight((feed, width), 0), Weight((feed, width), 0), Weight((width, feed), 1))
    table = Weight((model.vocabulary, width), 0)
    first = (replace(table, looked_up=True),)
    blocks = (Alike((*norms, *attention, *swiglu), model.layers),)
    return Model(blocks=blocks, first=first, last=(norms[0], table))


def vit(model: Vit, picture: Picture, classes: int) -> Model:
    """`models/vit.py`."""
    width, feed = model.width, model.feed_width
    norm = (Weight((width,)), Weight((width,)))
    columns = (Weight((width, width), 0), Weight((width,), 0))
    attention = (*columns * 3, Weight((width, width), 1), Weight((width,)))
    feeding = (Weight((feed, width), 0), Weight((feed,), 0), Weight((width, feed), 1), Weight((width,)))
    pixels = picture.channels * model.patch**2
    first = (Weight((width, pixels), 1), Weight((width,)), Weight((model.patches(picture), width), 0, looked_up=True))
    last = (*norm, Weight((classes, width), 0), Weight((classes,), 0))
    return Model(blocks=(Alike((*norm, *norm, *attention, *feeding), model.layers),), first=first, last=last)


@dataclass(frozen=True)
class Convolution:
    """`given` → `gives` channels by windows of `side` × `side`, onto `size` × `size` places."""

    given: int
    gives: int
    side: int
    size: int

    @property
    def outputs(self) -> int:
        """Numbers that it gives per picture."""
        return self.gives * self.size**2

    @property
    def inputs(self) -> int:
        """Numbers that it is given per picture, where it keeps the resolution."""
        return self.given * self.size**2

    @property
    def weights(self) -> Unit:
        """With the norm that follows."""
        return (Weight((self.gives, self.given, self.side, self.side)), Weight((self.gives,)), Weight((self.gives,)))


@dataclass(frozen=True)
class ResidualBlock:
    """The convolutions of a block, in a row, and the one on the short way if there is one; `times` such blocks follow
    each other. The block is given `given_size` × `given_size` places."""

    convolutions: tuple[Convolution, ...]
    short: Convolution | None
    given_size: int
    times: int = 1


def stem(model: Resnet, picture: Picture) -> Convolution:
    """The entrance."""
    small = picture.size <= RESNET_SMALL
    return Convolution(
        picture.channels, model.width, 3 if small else 7, picture.size if small else halved(picture.size)
    )


def halved(size: int) -> int:
    """After a stride of 2."""
    return -(-size // 2)


def residual_blocks(model: Resnet, picture: Picture) -> list[ResidualBlock]:
    """All blocks in their order: of each stage the first, then the others, which are alike."""
    blocks, given = [], model.width
    size = stem(model, picture).size
    size = size if picture.size <= RESNET_SMALL else halved(size)
    for stage, depth in enumerate(model.depths):
        inside = model.width * 2**stage
        after = halved(size) if stage else size
        blocks.append(_block(model, inside, given=given, before=size, after=after))
        given, size = inside * model.expansion, after
        if depth > 1:
            blocks.append(replace(_block(model, inside, given=given, before=size, after=size), times=depth - 1))
    return blocks


def _block(model: Resnet, inside: int, *, given: int, before: int, after: int) -> ResidualBlock:
    gives = inside * model.expansion
    short = Convolution(given, gives, 1, after) if before != after or given != gives else None
    if model.bottleneck:
        row = (Convolution(given, inside, 1, before), Convolution(inside, inside, 3, after))
        return ResidualBlock((*row, Convolution(inside, gives, 1, after)), short, before)
    return ResidualBlock((Convolution(given, gives, 3, after), Convolution(gives, gives, 3, after)), short, before)


def resnet(model: Resnet, picture: Picture, classes: int) -> Model:
    """`models/resnet.py`."""
    blocks = []
    for block in residual_blocks(model, picture):
        every = block.convolutions if block.short is None else (*block.convolutions, block.short)
        blocks.append(Alike(tuple(weight for convolution in every for weight in convolution.weights), block.times))
    gives = residual_blocks(model, picture)[-1].convolutions[-1].gives
    last = (Weight((classes, gives)), Weight((classes,)))
    return Model(blocks=tuple(blocks), first=stem(model, picture).weights, last=last)


def recsys_dense(model: RecsysModel) -> Unit:
    """The layers of `models/dlrm.py`."""
    stacks = (model.bottom_widths, model.top_widths)
    pairs = [pair for widths in stacks for pair in pairwise(widths)]
    return tuple(weight for given, gives in pairs for weight in (Weight((gives, given)), Weight((gives,))))


def recsys_tables(model: RecsysModel) -> Weight:
    """All tables, as the one parameter that they are."""
    return Weight((sum(model.table_rows), model.dim))
