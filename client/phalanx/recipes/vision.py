"""The `vision` recipe's whole configuration: a classifier of pictures, ViT or ResNet. Standard library only.

Owns the models' sizes, how pictures are changed on the way in, and what these demand of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from phalanx.recipes.config import RecipeConfig
from phalanx.recipes.parallel import divisors
from phalanx.recipes.parse import RecipeError, demand, demand_sizes
from phalanx.recipes.precision import check_fp8, refuse_fp8

DIGITS_SIZE = 8  # pixels


@dataclass(frozen=True)
class Picture:
    """What a model is given: `channels` × `size` × `size` numbers."""

    channels: int
    size: int


@dataclass(frozen=True)
class Vit:
    """`layers` blocks of attention (`heads`) and a GELU layer of width `hidden` (0: four times `width`), over squares
    of `patch` × `patch` pixels. The defaults are ViT-S/16."""

    patch: int = 16
    layers: int = 12
    width: int = 384
    heads: int = 6
    hidden: int = 0

    def __post_init__(self) -> None:
        demand_sizes(self, least=1, patch=1 << 16, layers=4096, width=1 << 20, heads=1 << 20)
        demand_sizes(self, least=0, hidden=1 << 22)
        text = f"does not divide width = {self.width}; use {divisors(self.width)}"
        demand(self.width % self.heads == 0, "heads", self.heads, text)

    @property
    def feed_width(self) -> int:
        """Inner width of the GELU layers."""
        return self.hidden or 4 * self.width

    def patches(self, picture: Picture) -> int:
        """Squares per picture."""
        return (picture.size // self.patch) ** 2

    def parameters(self, picture: Picture, classes: int) -> int:
        """How many there are."""
        width, feed = self.width, self.feed_width
        block = 4 * width * width + 4 * width + 2 * width * feed + feed + width + 4 * width
        ends = (picture.channels * self.patch**2 + 1) * width + self.patches(picture) * width
        return self.layers * block + ends + 2 * width + (width + 1) * classes


@dataclass(frozen=True)
class Resnet:
    """Residual blocks of convolutions: `depths` blocks per stage, each stage with half the pixels and twice the
    channels of the one before; the first has `width`. `bottleneck` blocks are three convolutions that give four times
    as many channels. The defaults are ResNet-18, [3, 4, 6, 3] with `bottleneck` ResNet-50. `groups` share their
    statistics in the norms."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    bottleneck: bool = False
    groups: int = 32

    def __post_init__(self) -> None:
        good = bool(self.depths) and min(self.depths) >= 1
        demand(good, "depths", self.depths, "is not a list of positive numbers; use [2, 2, 2, 2]")
        few = len(self.depths) <= 8 and max(self.depths) <= 4096
        demand(few, "depths", self.depths, "is too large; use at most 8 stages of at most 4096 blocks")
        demand_sizes(self, least=1, groups=1 << 20, width=1 << 20)
        text = f"is not a multiple of groups = {self.groups}; use one, or fewer groups"
        demand(self.width % self.groups == 0, "width", self.width, text)

    @property
    def expansion(self) -> int:
        """Channels that a block gives, per channel that it computes in."""
        return 4 if self.bottleneck else 1


@dataclass(frozen=True)
class VisionModel:
    """`kind` says which of the two sections counts. `classes` has to be more than the largest label."""

    kind: Literal["vit", "resnet"] = "vit"
    classes: int = 10
    vit: Vit = field(default_factory=Vit)
    resnet: Resnet = field(default_factory=Resnet)

    def __post_init__(self) -> None:
        demand(self.classes >= 2, "classes", self.classes, "leaves nothing to tell apart; use 2 or more")
        demand_sizes(self, least=2, classes=1 << 28)


@dataclass(frozen=True)
class Augment:
    """Changes of each training picture, drawn anew every epoch. `resized` cuts out a part of at least `min_area` and
    scales it to the full size (Szegedy et al. 2015, arXiv:1409.4842); `shift` moves the picture by at most `shift`
    pixels; then half of the pictures are mirrored where `flip`."""

    crop: Literal["none", "resized", "shift"] = "resized"
    min_area: float = 0.25
    shift: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        demand(0 < self.min_area <= 1, "min_area", self.min_area, "is a share; use a number in (0, 1]")
        demand_sizes(self, least=0, shift=1 << 16)


@dataclass(frozen=True)
class VisionConfig(RecipeConfig):
    """What `run: {recipe: vision, args: …}` holds."""

    FOUND = MappingProxyType({"accuracy": "highest"})

    model: VisionModel = field(default_factory=VisionModel)
    augment: Augment = field(default_factory=Augment)

    @property
    def picture(self) -> Picture:
        """What the data's pictures are brought to."""
        digits = self.data.format == "digits"
        return Picture(channels=1, size=DIGITS_SIZE) if digits else Picture(channels=3, size=self.data.image_size)

    def check_model(self) -> None:
        if self.data.format not in ("images", "tar", "digits"):
            raise RecipeError("data.format", f"= {self.data.format!r} has no pictures; use images, tar or digits")
        _check_layout(self)
        _check_precision(self)


def _check_layout(config: VisionConfig) -> None:
    model, parallel = config.model, config.parallel
    for axis in ("pipeline", "context"):
        if getattr(parallel, axis) > 1:
            raise RecipeError(f"parallel.{axis}", f"= {getattr(parallel, axis)}: vision has no such layout; use 1")
    if model.kind == "resnet" and parallel.tensor > 1:
        raise RecipeError("parallel.tensor", f"= {parallel.tensor}: convolutions are not cut; use 1, and shard or data")
    if model.kind == "vit":
        _check_vit(model, config.picture, parallel.tensor)


def _check_precision(config: VisionConfig) -> None:
    if config.model.kind == "resnet":
        refuse_fp8(config.precision, "is for linear layers, and a resnet's are convolutions")
        return
    sizes = {"model.vit.width": config.model.vit.width, "model.vit.hidden": config.model.vit.feed_width}
    check_fp8(config.precision, sizes, tensor=config.parallel.tensor)


def _check_vit(model: VisionModel, picture: Picture, tensor: int) -> None:
    vit = model.vit
    if picture.size % vit.patch:
        text = f"= {vit.patch} does not divide the pictures' {picture.size} pixels; use {divisors(picture.size)}"
        raise RecipeError("model.vit.patch", text)
    pieces = {"heads": vit.heads, "feed_width": vit.feed_width, "patches": vit.patches(picture)}
    for name, size in pieces.items():
        if size % tensor:
            raise RecipeError("parallel.tensor", f"= {tensor} does not divide the ViT's {name} = {size}; use a divisor")
    # Cut too, evenly or not; but torch (2.13) updates none that is shorter than there are ranks.
    shared = {"model.classes": model.classes, "channels × model.vit.patch²": picture.channels * vit.patch**2}
    for name, size in shared.items():
        if size < tensor:
            raise RecipeError("parallel.tensor", f"= {tensor} is more than {name} = {size}; use at most {size}")
