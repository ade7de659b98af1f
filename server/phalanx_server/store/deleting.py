"""Owns how files are taken away: what is not there is passed over, and a storage that is away is not an empty one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


@contextmanager
def passing_over(fs: Any, root: str, path: str) -> Iterator[None]:
    """What is done here to `path`, below `root`, is nothing where it is not there. Raises what the storage says, and
    FileNotFoundError where it is not there itself. `exists` is not asked: it costs a request more, and takes every
    error for a no."""
    try:
        yield
    except FileNotFoundError:
        if _is_there(fs, path):  # somebody else deletes in it
            raise
        _expect_root(fs, root)


def delete_paths(fs: Any, root: str, paths: Iterable[str]) -> None:
    """Delete what is there of `paths`, which may name directories below `root`. Raises as `passing_over` does."""
    for path in paths:
        with passing_over(fs, root, path):
            fs.rm(path, recursive=True)


def _is_there(fs: Any, path: str) -> bool:
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def _expect_root(fs: Any, root: str) -> None:
    """A volume that is not mounted has no files either. In an object storage there are no directories to look for."""
    if not isinstance(fs, LocalFileSystem):
        return
    try:
        Path(root).stat()
    except FileNotFoundError as error:
        why = f"The storage {root} is not there. If it is on a volume, mount it; otherwise make the directory."
        raise FileNotFoundError(why) from error
