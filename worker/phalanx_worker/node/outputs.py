"""The files that the ranks of a group leave: which they are, and how they are opened.

Owns what is collected and what is left out. The runner is often root, and ranks wrote these directories (other ranks of
the same user may even now): no link is followed on any part of a path, nothing but a regular file is ever read, and
where ranks run under own users only what belongs to theirs. Knows no server.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from phalanx.globs import Matcher, matcher, matches

PATH_MAX_BYTES = 1024
DEPTH_MAX = 64
LOOKED_AT_MAX = 500_000  # as many files as a bundle may have
CHUNK_BYTES = 1 << 20
_SAID_PATTERNS = 3

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a FIFO blocks nobody
_STEERING = frozenset({"Cc", "Cs", "Zl", "Zp"})  # these two as the server's domain.output
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

NO_FILE = "links, pipes or devices"
FOREIGN = "of another user"
BAD_NAME = "with a name that is too long, not UTF-8 or holds control characters"
TOO_DEEP = f"directories below {DEPTH_MAX} others"
UNREADABLE = "that cannot be looked at"
TWICE = "with the same path as one in PHALANX_OUTPUT_DIR"


@dataclass(frozen=True)
class Limits:
    """Of one group."""

    files: int = 10_000
    bytes: int = 10 << 30
    look_s: float = 60.0  # patterns may be such that each name takes long, and GPUs are held meanwhile


@dataclass(frozen=True)
class Source:
    """Where to look: everything in `output`, what fits the patterns in `work`. `uid`: whom it must belong to."""

    output: str
    work: str
    patterns: list[str]
    uid: int | None
    limits: Limits = Limits()


@dataclass(frozen=True)
class OutputFile:
    """A regular file, as it was when it was found: `path` is relative to `root`."""

    root: str
    path: str
    bytes: int


class _Enough(Exception):
    """There is more than anybody should look at."""


@dataclass
class Collected:
    """`left_out` counts by reason; `all_seen`: nothing else is there; `unmatched`: patterns that nothing there fits."""

    files: list[OutputFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    all_seen: bool = True
    unmatched: list[str] = field(default_factory=list)

    def left_out_sentence(self) -> str:
        """For the user; "" if nothing was."""
        if not self.left_out and self.all_seen:
            return ""
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        looked = f"whatever comes after {LOOKED_AT_MAX:,} files or a minute of looking"
        more = "" if self.all_seen else f"{'; ' if reasons else ''}{looked}"
        return f"Output files were left out: {reasons}{more}."

    def unmatched_sentence(self, where: str = "") -> str:
        """For the user; "" if something fits each pattern. `where`: of which node it is said."""
        if not self.unmatched:
            return ""
        *others, last = self.unmatched[:_SAID_PATTERNS]
        more = len(self.unmatched) - _SAID_PATTERNS
        said = f"{', '.join(others)} or {last}" if others else last
        return (
            f"No file in the working directory{where} fits {said}"
            f"{f', or any of {more} more' if more > 0 else ''} (run.outputs)."
        )


def collect(source: Source, given_up: threading.Event) -> Collected:
    """All files of a group that are to be delivered, in the order of their names. Blocking."""
    found = _Collecting(source, given_up)
    try:
        found.take(source.output, matcher(["**"]))
        if source.patterns:
            found.take(source.work, matcher(source.patterns))
        found.collected.unmatched = list(found.unmatched)
    except _Enough:
        found.collected.all_seen = False
    return found.collected


class _Collecting:
    """Goes through directories by their descriptors, so that none can be exchanged for a link on the way."""

    def __init__(self, source: Source, given_up: threading.Event):
        self.collected = Collected()
        self.unmatched = {pattern: matcher([pattern]) for pattern in source.patterns}
        self._source = source
        self._given_up = given_up
        self._paths: set[str] = set()
        self._bytes = 0
        self._looked_at = 0
        self._until = time.monotonic() + source.limits.look_s

    def take(self, root: str, wanted: Matcher) -> None:
        try:
            descriptor = os.open(root, _DIRECTORY)
        except FileNotFoundError:
            return  # the job has removed it
        except OSError:
            return self._leave_out(UNREADABLE)
        try:
            for path, status in self._walk(descriptor, "", wanted, depth=0):
                self._take_file(root, path, status)
        finally:
            os.close(descriptor)

    def _walk(self, directory: int, above: str, wanted: Matcher, *, depth: int) -> Iterator[tuple[str, os.stat_result]]:
        """Everything wanted in the open directory but directories."""
        for name in self._names(directory):
            self._expect_more_to_do()
            path, inner = above + name, wanted.enter(name)
            if not inner.may_fit:
                continue
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue  # it has gone
            except OSError:
                self._leave_out(UNREADABLE)
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk_below(directory, name, path, inner, depth=depth + 1)
            elif inner.fits:
                yield path, status

    def _walk_below(
        self, directory: int, name: str, path: str, wanted: Matcher, *, depth: int
    ) -> Iterator[tuple[str, os.stat_result]]:
        if depth > DEPTH_MAX:
            return self._leave_out(TOO_DEEP)
        try:
            descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
        except OSError:
            return self._leave_out(UNREADABLE)
        try:
            yield from self._walk(descriptor, f"{path}/", wanted, depth=depth)
        finally:
            os.close(descriptor)

    def _names(self, directory: int) -> list[str]:
        names = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    self._looked_at += 1
                    self._expect_more_to_do()
                    names.append(entry.name)
        except OSError:
            self._leave_out(UNREADABLE)
        return sorted(names)

    def _expect_more_to_do(self) -> None:
        if self._looked_at > LOOKED_AT_MAX or self._given_up.is_set() or time.monotonic() > self._until:
            raise _Enough

    def _take_file(self, root: str, path: str, status: os.stat_result) -> None:
        for pattern in [each for each, at_top in self.unmatched.items() if matches(at_top, path)]:
            del self.unmatched[pattern]
        reason = self._objection(path, status)
        if reason:
            return self._leave_out(reason)
        self._paths.add(path)
        self._bytes += status.st_size
        self.collected.files.append(OutputFile(root, path, status.st_size))

    def _objection(self, path: str, status: os.stat_result) -> str:
        limits = self._source.limits
        if not stat.S_ISREG(status.st_mode):
            return NO_FILE
        if not _is_own(status, self._source.uid):
            return FOREIGN
        if not _is_fit(path):
            return BAD_NAME
        if path in self._paths:
            return TWICE
        if len(self.collected.files) >= limits.files:
            return f"over the limit of {limits.files:,} files"
        if self._bytes + status.st_size > limits.bytes:
            return f"over the limit of {limits.bytes:,} bytes"
        return ""

    def _leave_out(self, reason: str) -> None:
        self.collected.left_out[reason] += 1


def _is_own(status: os.stat_result, uid: int | None) -> bool:
    """A hard link shows whose file it is: nobody can make a file that is not theirs look like theirs."""
    return uid is None or status.st_uid == uid


def _is_fit(path: str) -> bool:
    if any(character in _REORDERING or unicodedata.category(character) in _STEERING for character in path):
        return False  # a name that is not UTF-8 is read with lone surrogates in it
    return len(path.encode()) <= PATH_MAX_BYTES


# ------------------------------------------------------------------ reading


def open_file(file: OutputFile, uid: int | None) -> int:
    """A descriptor to read it by. Raises OSError where it is not what was found any more."""
    *above, name = file.path.split("/")
    directory = os.open(file.root, _DIRECTORY)
    try:
        for part in above:
            below = os.open(part, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = below
        descriptor = os.open(name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not _is_own(status, uid) or status.st_size != file.bytes:
        os.close(descriptor)
        raise OSError(errno.ESTALE, "the file has changed", file.path)
    return descriptor


def sha256(descriptor: int, size_bytes: int, given_up: threading.Event) -> str:
    """Of the first `size_bytes`, in hex. Blocking. Raises OSError where there are not so many, or it is given up."""
    digest, at = hashlib.sha256(), 0
    while at < size_bytes:
        piece = os.pread(descriptor, min(CHUNK_BYTES, size_bytes - at), at)
        if not piece or given_up.is_set():
            raise OSError(errno.ESTALE, "the file has changed")
        digest.update(piece)
        at += len(piece)
    return digest.hexdigest()
