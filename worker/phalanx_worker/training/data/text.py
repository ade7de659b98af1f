"""Documents out of text, JSONL and Parquet, turned once per node into one token file.

Owns reading the three formats; a document is read in pieces, so no file has to fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError, File
from phalanx_worker.training.data.prepared import prepared
from phalanx_worker.training.data.tokenizer import Tokenizer
from phalanx_worker.training.data.tokens import Tokens, width_for, write_tokens

Piece = tuple[bytes, bool]  # some text, and whether a document ends with it

PIECE_BYTES = 1 << 20
BATCH_PIECES = 64
BATCH_BYTES = 16 << 20

SUFFIXES = {
    "text": (),
    "jsonl": (".jsonl", ".json", ".ndjson", ".gz", ".zst", ".xz", ".bz2"),
    "parquet": (".parquet",),
}


def prepare(found: list[File], *, format: str, field: str, tokenizer: Tokenizer, cache: str | None) -> Path:
    """One token file of all documents, in the order of the files; made where it is not there yet. Raises DataError."""
    read: dict[str, Callable[[File], Iterator[Piece]]] = {
        "text": text_pieces,
        "jsonl": lambda file: jsonl_pieces(file, field),
        "parquet": lambda file: parquet_pieces(file, field),
    }

    def make(stream: IO[bytes]) -> None:
        pieces = chain.from_iterable(map(read[format], found))
        write_tokens(stream, tokens_of(pieces, tokenizer), vocab_size=tokenizer.vocab_size)

    width = width_for(tokenizer.vocab_size)
    name = files.fingerprint(found, format, field, tokenizer.name, width)
    return prepared(f"{name}.tokens", make, cache=cache)


def text_pieces(file: File) -> Iterator[Piece]:
    """The file as one document, in pieces that end with a line where lines allow it."""
    with file.open(decompress=True) as stream:
        here = _next(stream)
        while more := _next(stream):
            yield here, False
            here = more
        yield here, True


def jsonl_pieces(file: File, field: str) -> Iterator[Piece]:
    """A document for every line that is not empty."""
    with file.open(decompress=True) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _json_text(line, field, f"{file.url}, line {number}"), True


def parquet_pieces(file: File, field: str) -> Iterator[Piece]:
    """A document for every row that is not null."""
    with file.open() as stream:
        table = _parquet().ParquetFile(stream)
        if field not in table.schema_arrow.names:
            raise DataError(
                f"{file.url} has no column {field}, only {', '.join(table.schema_arrow.names)}; set data.field"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0):
                if value.is_valid:
                    yield _utf8(value.as_py(), f"{file.url}, column {field}"), True


def tokens_of(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The tokens of the pieces in order, each document followed by the separator."""
    end = np.array([] if tokenizer.separator is None else [tokenizer.separator], dtype=np.uint32)
    for batch in _batches(pieces):
        for encoded, (_, ends) in zip(tokenizer.encode([text for text, _ in batch]), batch, strict=True):
            yield encoded
            if ends:
                yield end


def _next(stream: IO[bytes]) -> bytes:
    """The next piece: to the end of a line, unless that is too far away."""
    return stream.read(PIECE_BYTES) + stream.readline(PIECE_BYTES)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if len(batch) == BATCH_PIECES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _json_text(line: bytes, field: str, where: str) -> bytes:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    if not isinstance(value, dict) or field not in value:
        raise DataError(f"{where} has no field {field}; set data.field")
    return _utf8(value[field], where)


def _utf8(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise DataError(f"{where}: {value!r:.40} is not text; set data.field to one that is")
    return value.encode("utf-8", errors="replace")


def _parquet() -> Any:
    try:
        import pyarrow.parquet  # optional: only this format needs it
    except ImportError:
        raise DataError("data.format = 'parquet' needs the package pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
