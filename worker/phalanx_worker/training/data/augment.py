"""What happens to a picture between its file and the model: a random cut, a mirror image, and numbers about zero.

Owns the changes. All that is random comes from the sample's own generator, so a picture is changed alike on any number
of ranks and workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from phalanx.recipes.vision import Augment
from torch import Tensor

from phalanx_worker.training.data.images import centered
from phalanx_worker.training.data.source import Sample

MEAN, STD = 0.5, 0.25  # of pixels in 0 to 1, about right for photographs
ASPECTS = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True)
class Augmented:
    """A transform for training: {"image": float32 (channels, size, size), …}."""

    augment: Augment
    size: int

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        image = self._cut(sample["image"], generator)
        if self.augment.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return {**sample, "image": centred_on_zero(image)}

    def _cut(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if self.augment.crop == "resized":
            return _resized(_part(image, self.augment.min_area, generator), self.size)
        image = centered(self.size)({"image": image}, generator)["image"]
        return _shifted(image, self.augment.shift, generator) if self.augment.crop == "shift" else image


@dataclass(frozen=True)
class Plain:
    """A transform for evaluation: the middle of the picture, as it is."""

    size: int

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        return {**sample, "image": centred_on_zero(centered(self.size)(sample, generator)["image"])}


def centred_on_zero(image: Tensor) -> Tensor:
    """uint8, or float in 0 to 1 -> float32 about zero."""
    unit = image.float() / 255 if image.dtype == torch.uint8 else image
    return (unit - MEAN) / STD


def _part(image: Tensor, min_area: float, generator: torch.Generator) -> Tensor:
    """A random rectangle of `min_area` to all of the picture, of a random shape; all of it where none fits."""
    height, width = image.shape[-2:]
    for _ in range(TRIES):
        share, place, top, left = torch.rand(4, generator=generator).tolist()
        area = height * width * (min_area + (1 - min_area) * share)
        low, high = (math.log(aspect) for aspect in ASPECTS)
        aspect = math.exp(low + (high - low) * place)
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(top * (height - rows + 1)), int(left * (width - columns + 1))
            return image[..., top : top + rows, left : left + columns]
    return image


def _resized(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None], size=(size, size), mode="bilinear", antialias=True)[0]


def _shifted(image: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Moved by up to `most` pixels each way; what comes in is black."""
    size = image.shape[-1]
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(image, (most,) * 4)[..., down : down + size, right : right + size]
