"""How much each group has written into its own directories on this node, against its allowance.

Owns the count and the pace of it: a little of each group's directories at a time, so that a million files cost no more
of the node than ten, only more rounds. Checkpoints are not counted: they are meant to stay. Files that were deleted and
are still open are not seen.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from phalanx_worker.node import offences
from phalanx_worker.node.environment import Places
from phalanx_worker.node.ranks import Group

log = logging.getLogger("phalanx.node.disk")

INTERVAL_S = 5.0
_ROUND_S = 0.5  # of counting, per group
_NAMES_AT_ONCE = 15  # each has at most 255 bytes, a path 4,096
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system
_LEAST_BYTES = 4096  # of each file, an empty one too: file systems run out of inodes


@dataclass
class Count:
    """Of some directories, over and over. `seen_bytes` grows during a walk; `known_bytes` is of the last whole one."""

    directories: list[str]
    seen_bytes: float = 0.0
    known_bytes: float = 0.0
    _files: Iterator[float] = field(default_factory=lambda: iter(()))
    _walks: bool = False

    @property
    def used_bytes(self) -> float:
        """At least this much: what a walk has found so far may be more than the last one found."""
        return max(self.seen_bytes, self.known_bytes)

    def go_on(self, until_s: float) -> None:
        """Count until the monotonic time `until_s`, or to the end of the walk."""
        if not self._walks:
            self._files, self.seen_bytes, self._walks = sizes_below(self.directories), 0.0, True
        for size_bytes in self._files:
            self.seen_bytes += size_bytes
            if time.monotonic() >= until_s:
                return
        self.known_bytes, self._walks = self.seen_bytes, False


class DiskWatch:
    """`allowed_bytes` of each group; 0: nothing is counted."""

    def __init__(self, allowed_bytes: int, groups: Callable[[], list[Group]]):
        self._allowed_bytes = allowed_bytes
        self._groups = groups
        self._counts: dict[tuple[str, int], Count] = {}

    async def run(self) -> None:
        while self._allowed_bytes > 0:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.tick()
            except Exception:  # what cannot be counted must not end the watching
                log.exception("counting files failed")

    async def tick(self) -> None:
        groups = [group for group in self._groups() if group.state != "ended"]
        self._counts = {group.key: self._counts.get(group.key) or Count(own_directories(group)) for group in groups}
        for group in groups:
            count = self._counts[group.key]
            await asyncio.to_thread(count.go_on, time.monotonic() + _ROUND_S)
            if count.used_bytes > self._allowed_bytes:
                group.fail(offences.disk_full(int(count.used_bytes), self._allowed_bytes))


def own_directories(group: Group) -> list[str]:
    places: Places = group.places
    return [path for path in (places.work, places.home, places.tmp, places.output) if "://" not in path]


def sizes_below(directories: list[str]) -> Iterator[float]:
    """What each file and directory below takes on the disk, in bytes; one with several names in equal parts, so that it
    counts once. Follows no link, and passes over what vanishes."""
    waiting = [_Directory(None, path) for path in directories]
    while waiting:
        yield from _sizes_in(waiting.pop(), waiting)


@dataclass(frozen=True, slots=True)
class _Directory:
    """Its path in parts, shared with what lies beside it: a job may have a million directories with long paths."""

    above: _Directory | None
    name: str

    @property
    def path(self) -> str:
        names, directory = [self.name], self.above
        while directory is not None:
            names.append(directory.name)
            directory = directory.above
        return "/".join(reversed(names))


def _sizes_in(directory: _Directory, waiting: list[_Directory]) -> Iterator[float]:
    """Of the entries of one directory; those to be walked as well are put into `waiting`."""
    try:
        fd = _open(directory.path)
    except OSError:
        return
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(_Directory(directory, entry.name))
                    yield float(_taken_bytes(status))
                else:
                    yield _taken_bytes(status) / max(1, status.st_nlink)
    except OSError:
        return
    finally:
        os.close(fd)


def _taken_bytes(status: os.stat_result) -> int:
    return max(_LEAST_BYTES, status.st_blocks * _BLOCK_BYTES)


def _open(directory: str) -> int:
    """In steps, since a path may be longer than the kernel takes at once: nobody hides files by nesting directories."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    names = directory.split("/")
    fd = os.open("/", flags)
    for start in range(0, len(names), _NAMES_AT_ONCE):
        above = fd
        try:
            fd = os.open("/".join(names[start : start + _NAMES_AT_ONCE]).lstrip("/") or ".", flags, dir_fd=above)
        finally:
            os.close(above)
    return fd
