"""Sizes in bytes as people write and read them.

Owns both directions for this side; the server has its own for job files.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


def text(size_bytes: float) -> str:
    """In the largest unit of which it is at least one, as 1.5 GiB."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB", "B") if size_bytes >= _UNITS[unit] or unit == "B")
    return f"{size_bytes / _UNITS[unit]:.1f}".removesuffix(".0") + f" {unit}"


def read(written: str) -> int:
    """From 64GiB, 512 MiB or a number of bytes. Raises ValueError."""
    match = _WRITTEN.fullmatch(written.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{written!r} is not a size: write 64GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])
