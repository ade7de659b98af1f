"""Tokens in memory-mapped files, and the windows of them that a language model is trained on.

Owns the file format. A file is a header of 32 bytes and then the tokens, little-endian, 2 or 4 bytes each:
magic `PHXTOKEN`, bytes per token (uint32), 0 (uint32), number of tokens (uint64), vocabulary size (uint64).
A `.bin` without that magic is all tokens, of the width that the configuration gives. Knows no text and no tokenizer.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError, File
from phalanx_worker.training.data.prepared import prepared
from phalanx_worker.training.data.source import Sample

MAGIC = b"PHXTOKEN"
_HEADER = struct.Struct("<8sIIQQ")
_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

Tokens = npt.NDArray[Any]  # one dimension, uint16 or uint32


def width_for(vocab_size: int) -> int:
    """Bytes per token that hold every symbol."""
    return 2 if vocab_size <= 1 << 16 else 4


def write_tokens(stream: IO[bytes], pieces: Iterable[Tokens], *, vocab_size: int) -> int:
    """Write a token file to a seekable stream, piece by piece; the number of tokens. The header comes last, so a file
    that was cut short does not read as a whole one."""
    width, count = width_for(vocab_size), 0
    stream.write(bytes(_HEADER.size))
    for piece in pieces:
        stream.write(piece.astype(_TYPES[width]).tobytes())
        count += len(piece)
    stream.seek(0)
    stream.write(_HEADER.pack(MAGIC, width, 0, count, vocab_size))
    stream.seek(0, 2)
    return count


@dataclass(frozen=True)
class TokenFile:
    """A token file as it lies: mapped when it is read, so that it costs no memory of its own."""

    path: Path
    width: int
    offset: int
    count: int
    vocab_size: int | None

    def tokens(self) -> Tokens:
        return np.memmap(self.path, dtype=_TYPES[self.width], mode="r", offset=self.offset, shape=(self.count,))


def read_header(path: Path, *, width: int) -> TokenFile:
    """What the file is; `width` (bytes per token) is for a file without a header. Raises DataError where its size
    does not fit."""
    size = path.stat().st_size
    head = path.open("rb").read(_HEADER.size)
    if not head.startswith(MAGIC):
        if size % width:
            raise DataError(f"{path} has {size} bytes, not a multiple of {width}; is data.token_type right?")
        return TokenFile(path, width, 0, size // width, None)
    _, width, _, count, vocab_size = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if width not in _TYPES or size != _HEADER.size + width * count:
        raise DataError(
            f"{path} has {size} bytes but its header speaks of {count} tokens of {width}; was it cut short?"
        )
    return TokenFile(path, width, _HEADER.size, count, vocab_size)


def local(file: File, *, cache: str | None) -> Path:
    """The file on this machine: itself, or a copy made once."""
    here = file.local_path
    if here is not None:
        return Path(here)

    def copy(stream: IO[bytes]) -> None:
        with file.open() as far:
            shutil.copyfileobj(far, stream, 1 << 24)

    return prepared(f"{files.fingerprint([file])}.bin", copy, cache=cache)


class TokenWindows:
    """Windows of `seq_len` + 1 tokens: {"tokens": int64 (seq_len + 1,)}, each sharing one token with the next, so that
    every token of a file but its first is predicted once in an epoch. No window spans two files; what is left at the
    end of a file is not used. Raises DataError where there is not one window."""

    def __init__(self, parts: Sequence[TokenFile], *, seq_len: int, vocab_size: int, fingerprint: str):
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._seq_len = seq_len
        self._parts = list(parts)
        self._ends = np.cumsum([max(0, part.count - 1) // seq_len for part in parts])
        self._maps: dict[int, Tokens] = {}  # opened in the process that reads
        if not len(self):
            raise DataError(
                f"{sum(part.count for part in parts)} tokens do not make one sample of {seq_len + 1}; "
                "give more data or a smaller data.seq_len"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[part - 1]) if part else 0)) * self._seq_len
        window = self._tokens(part)[start : start + self._seq_len + 1]
        return {"tokens": torch.from_numpy(window.astype(np.int64))}

    def _tokens(self, part: int) -> Tokens:
        if part not in self._maps:
            self._maps[part] = self._parts[part].tokens()
        return self._maps[part]
