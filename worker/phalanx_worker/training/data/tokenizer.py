"""Text to tokens: bytes as they are, or a given tokenizer.

Owns the choice between the two; trains none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from phalanx_worker.training.data import files
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.tokens import Tokens

BYTES = "bytes"


class Tokenizer(Protocol):
    """`separator` is put after every document; `name` changes with the outcome."""

    name: str
    vocab_size: int
    separator: int | None

    def encode(self, pieces: Sequence[bytes]) -> list[Tokens]: ...


def open_tokenizer(name: str, *, end_of_text: str | None = None) -> Tokenizer:
    """`bytes`, or the tokenizer in a Hugging Face `tokenizer.json` (path or URL). Raises DataError."""
    if name != BYTES:
        return FileTokenizer(name, end_of_text)
    if end_of_text is not None:
        raise DataError(
            f"data.end_of_text = {end_of_text!r} has no use with bytes, which put a zero byte; leave it out"
        )
    return ByteTokenizer()


class ByteTokenizer:
    """Every byte is a token; a zero byte, which text does not have, ends a document."""

    name = BYTES
    vocab_size = 256
    separator: int | None = 0

    def encode(self, pieces: Sequence[bytes]) -> list[Tokens]:
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]


class FileTokenizer:
    """A tokenizer of the Hugging Face `tokenizers` library; it encodes the pieces on several cores. Adds no symbols of
    its own but `end_of_text`."""

    def __init__(self, url: str, end_of_text: str | None):
        [file] = files.find([url])[:1]
        with file.open() as stream:
            self._tokenizer = _library().Tokenizer.from_str(stream.read().decode())
        self.name = f"{file.url} {file.version} {end_of_text}"
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self.separator = self._symbol(end_of_text, url) if end_of_text else None

    def encode(self, pieces: Sequence[bytes]) -> list[Tokens]:
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in found]

    def _symbol(self, symbol: str, url: str) -> int:
        token = self._tokenizer.token_to_id(symbol)
        if token is None:
            raise DataError(f"data.end_of_text = {symbol!r} is no symbol of {url}; look in its added_tokens")
        return int(token)


def _library() -> Any:
    try:
        import tokenizers  # optional: bytes need no library
    except ImportError:
        raise DataError(
            "data.tokenizer names a file, which needs the package tokenizers: pip install tokenizers"
        ) from None
    return tokenizers
