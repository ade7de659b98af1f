"""What a recipe reads: where it lies, in which form, and how it is brought to the ranks.

Owns the names and defaults only; what reads it is `phalanx_worker.training.data`. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.recipes.parse import demand, demand_sizes

Format = Literal["text", "jsonl", "parquet", "tokens", "images", "tar", "digits", "criteo"]


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are read.

    The order of the samples follows from `shuffle` and the recipe's seed alone, never from the number of ranks or of
    `workers`.
    """

    format: Format = "text"
    """lm: text, jsonl, parquet, tokens; vision: images (a directory per class), tar (WebDataset), digits; recsys:
    criteo."""

    paths: tuple[str, ...] = ()
    """Files, directories, globs or fsspec URLs (`s3://bucket/part-*.parquet`); none for `digits`."""

    field: str = "text"
    """The field of a JSONL line, or the column of a Parquet file, that holds the text."""

    tokenizer: str = "bytes"
    """`bytes` (256 symbols), or the path or URL of a Hugging Face `tokenizer.json`."""

    end_of_text: str | None = None
    """The tokenizer's symbol that is put after every document, such as `<|endoftext|>`; `bytes` puts a zero byte."""

    token_type: Literal["uint16", "uint32"] = "uint16"
    """How wide a token of a `.bin` file without a header is."""

    vocab_size: int | None = None
    """How many symbols there are, for `tokens`: needed where the files don't say it in their header."""

    seq_len: int = 256
    """Tokens per sample that are predicted; a sample holds one more."""

    image_size: int = 224
    """Width and height, in pixels, that images are brought to; `digits` stay 8 × 8."""

    shuffle: bool = True
    workers: int = 0
    """Processes that read ahead, per rank; 0 reads in the training process."""

    prefetch: int = 2
    """Batches that each worker has ready."""

    cache: str | None = None
    """A directory of the node for what is prepared once (tokens, indices); else `PHALANX_DATA_CACHE`, else a directory
    of the user's under the temporary one."""

    def __post_init__(self) -> None:
        demand(bool(self.paths) or self.format == "digits", "paths", self.paths, "names no data; give files or URLs")
        demand(self.seq_len > 0, "seq_len", self.seq_len, "must be at least 1")
        demand(self.image_size > 0, "image_size", self.image_size, "must be at least 1")
        demand(self.workers >= 0, "workers", self.workers, "must be 0 (read in the training process) or more")
        demand(self.prefetch > 0, "prefetch", self.prefetch, "must be at least 1")
        demand(
            self.vocab_size is None or self.vocab_size > 0,
            "vocab_size",
            self.vocab_size,
            "must be at least 1 or absent",
        )
        demand_sizes(self, least=1, seq_len=1 << 28, image_size=1 << 16, prefetch=1 << 16, vocab_size=1 << 28)
        demand_sizes(self, least=0, workers=1 << 10)
