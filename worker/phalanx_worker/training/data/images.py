"""Pictures with a label: a directory per class, or scikit-learn's handwritten digits.

Owns decoding and bringing pictures to one size; augmentation is a transform that a recipe gives.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError, File
from phalanx_worker.training.data.source import Sample, Transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


class ImageFolder:
    """`ROOT/CLASS/….jpg`: {"image": uint8 (3, height, width), "label": int}; classes are numbered by name."""

    def __init__(self, paths: Sequence[str]):
        self._files = files.find(paths, suffixes=SUFFIXES)
        self.classes = sorted({_class_of(file) for file in self._files})
        self.fingerprint = files.identity(self._files)
        self._labels = {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        file = self._files[index]
        return {"image": decoded(file.read(), file.url), "label": self._labels[_class_of(file)]}


class Digits:
    """1,797 handwritten digits of 8 × 8 pixels that come with scikit-learn: {"image": float32 (1, 8, 8) in 0 to 1,
    "label": int}. Source: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, doi:10.24432/C50P49."""

    fingerprint = "scikit-learn digits"

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits  # optional: only this source needs it
        except ImportError:
            raise DataError("data.format = 'digits' needs scikit-learn: pip install scikit-learn") from None
        bunch: Any = load_digits()
        self.classes = [str(name) for name in bunch.target_names]
        self._images = torch.from_numpy((bunch.images / 16.0).astype(np.float32)).unsqueeze(1)
        self._labels = bunch.target.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self._images[index], "label": self._labels[index]}


def decoded(data: bytes, where: str) -> Tensor:
    """A picture in any format that Pillow reads, as uint8 (3, height, width). Raises DataError naming it."""
    try:
        from PIL import Image  # optional: digits and text need no pictures
    except ImportError:
        raise DataError("reading pictures needs the package pillow: pip install pillow") from None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{where} is not a picture that can be read ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def centered(size: int) -> Transform:
    """A transform that brings pictures to size × size pixels: the shorter side scaled, the middle of the longer."""

    def transform(sample: Sample, _: torch.Generator) -> Sample:
        return {**sample, "image": _centered(sample["image"], size)}

    return transform


def _centered(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    shorter = min(height, width)
    scaled = (max(size, round(height * size / shorter)), max(size, round(width * size / shorter)))
    if scaled != (height, width):
        image = F.interpolate(image[None], size=scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image[..., top : top + size, left : left + size].contiguous()


def _class_of(file: File) -> str:
    return file.url.rsplit("/", 2)[-2]
