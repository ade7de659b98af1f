"""The source that a configuration asks for.

Owns the table of formats; each is a module of its own.
"""

from __future__ import annotations

from phalanx.recipes.data import DataConfig

from phalanx_worker.training.data import files, text, tokens
from phalanx_worker.training.data.criteo import ClickLog
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.images import Digits, ImageFolder, centered
from phalanx_worker.training.data.source import Source, Transform
from phalanx_worker.training.data.tar import TarShards
from phalanx_worker.training.data.tokenizer import open_tokenizer
from phalanx_worker.training.data.tokens import TokenFile, TokenWindows


def open_source(config: DataConfig) -> Source:
    """The samples that `config` names; prepares them where that is still to do. Raises DataError."""
    match config.format:
        case "text" | "jsonl" | "parquet":
            return _text(config)
        case "tokens":
            return _tokens(config)
        case "images":
            return ImageFolder(config.paths)
        case "tar":
            return TarShards(config.paths, cache=config.cache)
        case "digits":
            return Digits()
        case "criteo":
            return ClickLog(config.paths, cache=config.cache)


def default_transform(config: DataConfig) -> Transform | None:
    """What samples of the format need before they can be put together."""
    return centered(config.image_size) if config.format in ("images", "tar") else None


def vocab_size(config: DataConfig) -> int | None:
    """Symbols of the language model's data; None where only the files' headers can say it."""
    if config.format == "tokens":
        return config.vocab_size
    return open_tokenizer(config.tokenizer, end_of_text=config.end_of_text).vocab_size


def _text(config: DataConfig) -> TokenWindows:
    tokenizer = open_tokenizer(config.tokenizer, end_of_text=config.end_of_text)
    found = files.find(config.paths, suffixes=text.SUFFIXES[config.format])
    made = text.prepare(found, format=config.format, field=config.field, tokenizer=tokenizer, cache=config.cache)
    return _windows([tokens.read_header(made, width=2)], config, files.identity(found, tokenizer.name))


def _tokens(config: DataConfig) -> TokenWindows:
    found = files.find(config.paths, suffixes=(".bin", ".tokens"))
    width = 2 if config.token_type == "uint16" else 4
    parts = [tokens.read_header(tokens.local(file, cache=config.cache), width=width) for file in found]
    return _windows(parts, config, files.identity(found, width))


def _windows(parts: list[TokenFile], config: DataConfig, fingerprint: str) -> TokenWindows:
    said = {part.vocab_size for part in parts if part.vocab_size}
    size = config.vocab_size or max(said, default=None)
    if size is None:
        raise DataError("token files without a header do not say how many symbols there are; set data.vocab_size")
    if said and max(said) > size:
        raise DataError(f"data.vocab_size = {size} is less than the {max(said)} that the token files' header says")
    return TokenWindows(parts, seq_len=config.seq_len, vocab_size=size, fingerprint=f"{fingerprint} {config.seq_len}")
