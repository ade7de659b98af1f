"""Pictures in WebDataset-style tar shards: members that share a name up to the first dot are one sample.

Owns an index of where each member lies, made once per shard and node, so that any sample is read by itself, near or
far. Format: https://github.com/webdataset/webdataset (`KEY.jpg`, and `KEY.cls` with the label as a number).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError, File
from phalanx_worker.training.data.images import SUFFIXES, decoded
from phalanx_worker.training.data.prepared import prepared
from phalanx_worker.training.data.source import Sample

_ROW = ("offset", "bytes", "label")


class TarShards:
    """{"image": uint8 (3, height, width), "label": int} for every sample of the shards, in their order."""

    def __init__(self, paths: Sequence[str], *, cache: str | None = None):
        self._shards = files.find(paths, suffixes=(".tar",))
        self._rows = [np.load(_index(shard, cache), mmap_mode="r") for shard in self._shards]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        self.fingerprint = files.identity(self._shards)
        if not len(self):
            raise DataError(f"{self._shards[0].url} and the rest hold no picture with a label (KEY.jpg and KEY.cls)")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset, size, label = self._rows[shard][index - (int(self._ends[shard - 1]) if shard else 0)].tolist()
        picture = self._shards[shard].read(offset, offset + size)
        return {"image": decoded(picture, f"{self._shards[shard].url} at byte {offset}"), "label": label}


def index_rows(stream: IO[bytes], url: str) -> npt.NDArray[np.int64]:
    """A row (offset, bytes, label) for every sample in the tar, in one pass. Raises DataError."""
    return np.array(list(_rows(stream, url)), dtype=np.int64).reshape(-1, len(_ROW))


def _index(shard: File, cache: str | None) -> Path:
    def make(stream: IO[bytes]) -> None:
        with shard.open() as tar:
            np.save(stream, index_rows(tar, shard.url))

    return prepared(f"{files.fingerprint([shard], _ROW)}.index.npy", make, cache=cache)


def _rows(stream: IO[bytes], url: str) -> Iterator[tuple[int, int, int]]:
    for key, members in _samples(stream, url):
        picture = next((members[suffix] for suffix in members if suffix in SUFFIXES), None)
        if picture is None:
            continue
        if ".cls" not in members:
            raise DataError(f"{url}: {key} has a picture but no {key}.cls with its label")
        yield picture[0], picture[1], members[".cls"][2]


def _samples(stream: IO[bytes], url: str) -> Iterator[tuple[str, dict[str, tuple[int, int, int]]]]:
    """Key by key: the suffix of each member -> (offset, bytes, label or -1)."""
    key, members = "", {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name, suffix = _split(member.name)
                if name != key and members:
                    yield key, members
                    members = {}
                key = name
                members[suffix] = (member.offset_data, member.size, _label(tar, member, suffix, url))
                tar.members = []  # else it remembers every member: gigabytes for large shards  # pyright: ignore
    except tarfile.TarError as error:
        raise DataError(f"{url} is not a plain tar file ({error}); compressed ones have to be unpacked") from None
    if members:
        yield key, members


def _split(name: str) -> tuple[str, str]:
    directory, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return directory + slash + stem, (dot + suffix).lower()


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, url: str) -> int:
    if suffix != ".cls":
        return -1
    content: Any = tar.extractfile(member)
    text = content.read()
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{url}: {member.name} holds {text!r:.40}, not the number of a class") from None
