"""Packs a working directory into a bundle: one tar.gz whose SHA-256 names it. It owns what goes in and how it is
written; it refuses to know where the bundle goes.

The same tree always gives the same bytes: entries are sorted, times and owners are zero, of the permissions only the
executable bit is kept. What .gitignore files say (nested ones, and those of the repository above), and .phalanxignore
files in the same syntax, stays out, and so do `.git`, `__pycache__`, `.venv` and `.phalanx`. Symbolic links that stay
inside the directory are kept as links.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from phalanx.errors import BundleError

ALWAYS_EXCLUDED = frozenset({".git", "__pycache__", ".venv", ".phalanx"})
IGNORE_FILES = (".gitignore", ".phalanxignore")
MAX_BYTES = 256 << 20
MAX_FILES = 20_000
LARGEST_NAMED = 5
COMPRESSION_LEVEL = 6
EXCLUDE_HINT = "exclude what the job does not need in .phalanxignore (same syntax as .gitignore)"


@dataclass(frozen=True)
class Entry:
    """Something to pack. `name` is relative to the directory, with slashes; `link` is a symbolic link's target."""

    name: str
    path: Path
    bytes: int
    executable: bool = False
    link: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A packed directory in a temporary file, to be discarded after use."""

    path: Path
    sha256: str
    bytes: int
    files: int

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def pack(directory: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Bundle:
    """Pack `directory`. BundleError where it is not a directory, is too large, or holds what cannot be packed.

    `max_bytes` bounds the files before compression.
    """
    entries = scan(directory, max_bytes=max_bytes, max_files=max_files)
    descriptor, name = tempfile.mkstemp(prefix="phalanx-bundle-", suffix=".tar.gz")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            hashed = _Hashed(file)
            _write(hashed, entries)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Bundle(path, hashed.digest.hexdigest(), path.stat().st_size, len(entries))


def scan(directory: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> list[Entry]:
    """What would be packed, sorted by name; BundleError as for `pack`."""
    root = directory.resolve()
    if not root.is_dir():
        raise BundleError(f"{directory} is not a directory: give the directory that holds the code")
    entries: list[Entry] = []
    total_bytes = 0
    for entry in _walk(root, root, _rules_above(root)):
        entries.append(entry)
        total_bytes += entry.bytes
        if len(entries) > 2 * max_files:  # enough to name the largest; do not walk a whole home directory
            break
    if total_bytes > max_bytes or len(entries) > max_files:
        raise BundleError(_too_large(directory, entries, total_bytes, max_bytes=max_bytes, max_files=max_files))
    return sorted(entries, key=lambda entry: entry.name)


# ------------------------------------------------------------------ which files


@dataclass(frozen=True)
class _Pattern:
    """One line of an ignore file; `ignores` is False for a `!` pattern."""

    regex: re.Pattern[str]
    ignores: bool
    directories_only: bool

    def matches(self, name: str, *, is_directory: bool) -> bool:
        """Whether it means the entry itself. That it means a directory above (which the regex marks with a group) has
        been decided there: what is under an ignored one is never asked about."""
        if self.directories_only and not is_directory:
            return False
        found = self.regex.search(name)
        return found is not None and found.lastindex is None


@dataclass(frozen=True)
class _Rules:
    """The patterns of one ignore file, which count from the directory it is in."""

    base: Path
    patterns: list[_Pattern]

    def verdict(self, path: Path, *, is_directory: bool) -> bool | None:
        """True: ignored; False: a `!` pattern keeps it; None: nothing said. The last pattern that fits decides."""
        name = path.relative_to(self.base).as_posix()
        fits = (one for one in reversed(self.patterns) if one.matches(name, is_directory=is_directory))
        return next((one.ignores for one in fits), None)


def _rules_in(directory: Path) -> list[_Rules]:
    return [_Rules(directory, _patterns(file)) for name in IGNORE_FILES if (file := directory / name).is_file()]


def _patterns(file: Path) -> list[_Pattern]:
    try:
        text = file.read_text("utf-8-sig", errors="surrogateescape")  # names are not always UTF-8
    except OSError as error:
        raise BundleError(f"{file} cannot be read as an ignore file: {error.strerror}") from None
    return [pattern for line in text.split("\n") if (pattern := _pattern(line))]


def _pattern(line: str) -> _Pattern | None:
    """None for a comment, an empty line, and what is no pattern: git passes over that too."""
    text = line if line.endswith("\\ ") else line.rstrip(" ")
    try:
        matcher = GitIgnoreSpecPattern(text.removesuffix("/"))
    except (ValueError, re.error):
        return None
    if matcher.regex is None:
        return None
    regex = re.sub(r"\[\^(?!/\])", "(?!/)[^", matcher.regex.pattern)  # [!x] is no slash either
    return _Pattern(re.compile(regex), ignores=bool(matcher.include), directories_only=text.endswith("/"))


def _rules_above(root: Path) -> list[_Rules]:
    """The ignore files between the repository that holds `root` and `root` itself, outermost first."""
    repository = next((parent for parent in root.parents if (parent / ".git").exists()), None)
    if repository is None or (root / ".git").exists():
        return []
    rules: list[_Rules] = []
    for parent, child in pairwise(path for path in (*reversed(root.parents), root) if path.is_relative_to(repository)):
        rules = rules + _rules_in(parent)
        if _ignored(child, rules, is_directory=True):  # git ignores it as a whole, but it was asked for by name
            return []
    return rules


def _ignored(path: Path, rules: list[_Rules], *, is_directory: bool) -> bool:
    """The innermost file that says something decides (gitignore(5))."""
    for rule in reversed(rules):
        verdict = rule.verdict(path, is_directory=is_directory)
        if verdict is not None:
            return verdict
    return False


def _walk(root: Path, directory: Path, rules: list[_Rules]) -> Iterator[Entry]:
    rules = rules + _rules_in(directory)
    try:
        found = sorted(os.scandir(directory), key=lambda item: item.name)
    except OSError as error:
        raise BundleError(f"{directory} cannot be read ({error.strerror}): {EXCLUDE_HINT}") from None
    for item in found:
        path, is_directory = Path(item.path), item.is_dir(follow_symlinks=False)
        if item.name in ALWAYS_EXCLUDED or _ignored(path, rules, is_directory=is_directory):
            continue
        if is_directory:
            yield from _walk(root, path, rules)
        else:
            yield _entry(root, path)


def _entry(root: Path, path: Path) -> Entry:
    name = path.relative_to(root).as_posix()
    try:
        status = path.lstat()
    except OSError as error:
        raise BundleError(f"{name} cannot be read ({error.strerror}): {EXCLUDE_HINT}") from None
    if stat.S_ISLNK(status.st_mode):
        return Entry(name, path, 0, link=_link_inside(root, path))
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} is neither a file, a directory nor a link: {EXCLUDE_HINT}")
    return Entry(name, path, status.st_size, executable=bool(status.st_mode & stat.S_IXUSR))


def _link_inside(root: Path, path: Path) -> str:
    """Where it ends, relative to the link's own directory; BundleError where that is outside of `root`.

    Never as it was written: on the way from `../proj/data` in `proj` to `proj/data` it would leave the bundle.
    """
    if _goes_in_circles(path):
        raise BundleError(f"{path.relative_to(root)} links to itself: {EXCLUDE_HINT}")
    target = path.resolve()
    if not target.is_relative_to(root):
        raise BundleError(
            f"{path.relative_to(root)} links to {path.readlink()}, outside of the working directory: "
            "copy the target in, or exclude the link in .phalanxignore"
        )
    return os.path.relpath(target, path.parent)


def _goes_in_circles(link: Path) -> bool:
    """Asks the system: what Path.resolve() makes of a circle depends on Python's version."""
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


# ------------------------------------------------------------------ limits


def _too_large(directory: Path, entries: list[Entry], total_bytes: int, *, max_bytes: int, max_files: int) -> str:
    if total_bytes > max_bytes:
        said = f"{mebibytes(total_bytes)}, the limit is {mebibytes(max_bytes)}"
    else:
        said = f"more than {max_files} files"
    largest = ", ".join(f"{name} ({size})" for name, size in _largest(entries, by_size=total_bytes > max_bytes))
    return f"{directory} is too large to upload: {said}; largest: {largest}; {EXCLUDE_HINT}"


def _largest(entries: list[Entry], *, by_size: bool) -> list[tuple[str, str]]:
    """The top-level entries that weigh most, by bytes or by number of files."""
    weights: dict[str, int] = {}
    for entry in entries:
        top = entry.name.partition("/")[0]
        key = f"{top}/" if "/" in entry.name else top
        weights[key] = weights.get(key, 0) + (entry.bytes if by_size else 1)
    heaviest = sorted(weights.items(), key=lambda item: -item[1])[:LARGEST_NAMED]
    return [(name, mebibytes(weight) if by_size else f"{weight} files") for name, weight in heaviest]


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


# ------------------------------------------------------------------ writing


class _Hashed:
    """A writable that hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(out: _Hashed, entries: list[Entry]) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=COMPRESSION_LEVEL) as packed,  # type: ignore[arg-type]
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for entry in entries:
            _add(tar, entry)


def _add(tar: tarfile.TarFile, entry: Entry) -> None:
    info = tarfile.TarInfo(entry.name)
    if entry.link is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
        return tar.addfile(info)
    info.size, info.mode = entry.bytes, 0o755 if entry.executable else 0o644
    try:
        with entry.path.open("rb") as file:
            tar.addfile(info, file)
    except OSError as error:
        raise BundleError(f"{entry.name} cannot be read, or changed while it was packed ({error})") from None
