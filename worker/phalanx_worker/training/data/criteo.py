"""Click logs in Criteo's format: a label, 13 counts and 26 categories as hexadecimal words per line, separated by tabs.

Owns turning them, once per node, into records of fixed width that are mapped into memory. Format: Criteo Display
Advertising Challenge, https://www.kaggle.com/c/criteo-display-ad-challenge/data. Counts become log(1 + count), as in
M. Naumov et al., Deep Learning Recommendation Model, arXiv:1906.00091; what is missing or negative counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError, File
from phalanx_worker.training.data.prepared import prepared
from phalanx_worker.training.data.source import Sample

COUNTS, CATEGORIES = 13, 26
RECORD = np.dtype([("label", "<f4"), ("counts", "<f4", (COUNTS,)), ("categories", "<u4", (CATEGORIES,))])
CHUNK_LINES = 8192


class ClickLog:
    """{"dense": float32 (13,), "categories": int64 (26,) words of 32 bits, "label": float32 ()} per line. A recipe
    takes the words modulo the rows of its tables."""

    def __init__(self, paths: Sequence[str], *, cache: str | None = None):
        found = files.find(paths, suffixes=(".tsv", ".txt", ".csv", ".gz", ".zst"))
        self._paths = [_records(file, cache) for file in found]
        self._ends = np.cumsum([path.stat().st_size // RECORD.itemsize for path in self._paths])
        self.fingerprint = files.identity(found)
        self._maps: dict[int, npt.NDArray[Any]] = {}
        if not len(self):
            raise DataError(f"{found[0].url} and the rest hold no line")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        part = int(np.searchsorted(self._ends, index, side="right"))
        record = self._map(part)[index - (int(self._ends[part - 1]) if part else 0)]
        return {
            "dense": torch.from_numpy(record["counts"].copy()),
            "categories": torch.from_numpy(record["categories"].astype(np.int64)),
            "label": torch.tensor(float(record["label"])),
        }

    def _map(self, part: int) -> npt.NDArray[Any]:
        if part not in self._maps:
            self._maps[part] = np.memmap(self._paths[part], dtype=RECORD, mode="r")
        return self._maps[part]


def records(lines: Sequence[bytes], where: str) -> npt.NDArray[Any]:
    """The lines as an array of RECORD. Raises DataError naming the first that does not fit."""
    try:
        return _table(lines)
    except (ValueError, OverflowError):
        line = next(line for line in lines if not _fits(line))
        wanted = f"a label, {COUNTS} numbers and {CATEGORIES} hexadecimal words"
        raise DataError(f"{where}: {line!r:.60} is not {wanted}, separated by tabs") from None


def _table(lines: Sequence[bytes]) -> npt.NDArray[Any]:
    rows = [line.rstrip(b"\r\n").split(b"\t") for line in lines]
    table = np.zeros(len(rows), dtype=RECORD)
    table["label"] = [int(row[0]) for row in rows]
    table["counts"] = [[max(0, int(count)) if count else 0 for count in row[1 : 1 + COUNTS]] for row in rows]
    table["categories"] = [[int(word, 16) if word else 0 for word in row[1 + COUNTS :]] for row in rows]
    table["counts"] = np.log1p(table["counts"])
    return table


def _fits(line: bytes) -> bool:
    try:
        _table([line])
    except (ValueError, OverflowError):
        return False
    return True


def _records(file: File, cache: str | None) -> Path:
    def make(stream: IO[bytes]) -> None:
        for chunk in _chunks(file):
            stream.write(records(chunk, file.url).tobytes())

    return prepared(f"{files.fingerprint([file], RECORD.descr)}.clicks", make, cache=cache)


def _chunks(file: File) -> Iterator[list[bytes]]:
    with file.open(decompress=True) as stream:
        while chunk := list(islice(stream, CHUNK_LINES)):
            yield chunk
