"""Finding and opening what a recipe reads: local paths, globs, directories and any URL that fsspec knows.

Owns names and streams of bytes; knows no format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

# Under which of these a storage says that a file is another one: local, S3, Google, Azure, HTTP, in memory.
_VERSION_KEYS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created", "ino")


class DataError(ValueError):
    """The data cannot be used: what is wrong with which file, and what to do."""


@dataclass(frozen=True)
class File:
    """A file somewhere: `version` changes when its content does (size and time, or what the storage says)."""

    url: str
    version: str
    bytes: int

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def local_path(self) -> str | None:
        """Where it lies on this machine, if it does."""
        system, path = url_to_fs(self.url)
        return path if isinstance(system, LocalFileSystem) else None

    def open(self, *, decompress: bool = False) -> IO[bytes]:
        """A seekable stream of its bytes; `.gz`, `.zst` and the like are unpacked on request (then not seekable)."""
        opened: Any = fsspec.open(self.url, "rb", compression="infer" if decompress else None)
        return cast(IO[bytes], opened.open())

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """The bytes from `begin` to before `end`, and no more is fetched."""
        system, path = url_to_fs(self.url)
        return cast(bytes, system.cat_file(path, start=begin, end=end))


def find(paths: Iterable[str], *, suffixes: tuple[str, ...] = ()) -> list[File]:
    """The files that the paths, directories, globs and URLs name, each once: in the order of the paths, and by name
    within one. A directory or glob gives only files with one of the suffixes, if there are any, and none that is
    hidden. Raises DataError for a path that names nothing."""
    found: dict[str, File] = {}
    for path in paths:
        files = _expand(path, suffixes)
        if not files:
            wanted = f" with {' or '.join(suffixes)}" if suffixes else ""
            raise DataError(f"{path} names no file{wanted}; is it right, and does every node see it?")
        found |= {file.url: file for file in files if file.url not in found}
    return list(found.values())


def fingerprint(files: Iterable[File], *more: object) -> str:
    """A short name for these versions of the files, and for whatever else is given: what is made from them once."""
    return _digest([f"{file.url} {file.version}" for file in files], more)


def identity(files: Iterable[File], *more: object) -> str:
    """A short name for the data, the same on every node that has a copy: the files' names and sizes in their order."""
    return _digest([f"{file.name} {file.bytes}" for file in files], more)


def _digest(parts: list[str], more: tuple[object, ...]) -> str:
    digest = hashlib.sha256()
    for part in [*parts, *map(repr, more)]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _expand(path: str, suffixes: tuple[str, ...]) -> list[File]:
    system, inside = url_to_fs(path)
    if any(sign in inside for sign in "*?["):
        listed = system.glob(inside, detail=True)
    elif system.isfile(inside):
        return [_file(system, inside, system.info(inside))]
    else:
        listed = {} if not system.exists(inside) else system.find(inside, detail=True)
        listed = {name: info for name, info in listed.items() if "/." not in name.removeprefix(inside)}
    chosen = [name for name in listed if not suffixes or name.lower().endswith(suffixes)]
    return [_file(system, name, listed[name]) for name in sorted(chosen) if listed[name]["type"] == "file"]


def _file(system: Any, name: str, info: dict[str, Any]) -> File:
    size = int(info["size"] or 0)
    version = " ".join(str(info[key]) for key in _VERSION_KEYS if info.get(key))
    return File(url=system.unstrip_protocol(name), version=f"{size} {version}", bytes=size)
