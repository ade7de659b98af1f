"""Patterns of paths, as in `run.outputs` and `phalanx outputs`: `*.pt`, `out/**`, `logs/**/*.txt`.

Owns what they mean: as in pathlib, part by part, where `**` is any number of directories; and what names a directory
means everything below it. A walk may go with it: where no pattern can fit below a directory, it need not be entered.
Knows no file system. Standard library only.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

_ANY_DEPTH = "**"


@dataclass(frozen=True)
class Matcher:
    """Where a walk stands: for each pattern that may still fit, how many of its parts have."""

    patterns: tuple[tuple[re.Pattern[str] | None, ...], ...]  # by part; None is `**`
    reached: frozenset[tuple[int, int]]  # (pattern, parts that fit)

    @property
    def fits(self) -> bool:
        """Whether this path, or a directory above it, is meant."""
        return any(parts == len(self.patterns[index]) for index, parts in self.reached)

    @property
    def may_fit(self) -> bool:
        """Whether this path or anything below it can be meant."""
        return bool(self.reached)

    def enter(self, name: str) -> Matcher:
        """One part further down. Below what fits, everything does."""
        if self.fits:
            return self
        further = {each for at in self.reached for each in self._step(*at, name)}
        return Matcher(self.patterns, _settled(self.patterns, further))

    def _step(self, index: int, parts: int, name: str) -> Iterable[tuple[int, int]]:
        part = self.patterns[index][parts]
        if part is None:
            yield index, parts
        elif part.match(name):
            yield index, parts + 1


def matcher(patterns: Iterable[str]) -> Matcher:
    """At the top. A pattern without any part (`.`) means everything."""
    parsed = tuple(tuple(_part(part) for part in pattern.split("/") if part not in ("", ".")) for pattern in patterns)
    return Matcher(parsed, _settled(parsed, {(index, 0) for index in range(len(parsed))}))


def matches(at_top: Matcher, path: str) -> bool:
    at = at_top
    for part in path.split("/"):
        at = at.enter(part)
    return at.fits


def _part(text: str) -> re.Pattern[str] | None:
    return None if text == _ANY_DEPTH else re.compile(fnmatch.translate(text))


def _settled(
    patterns: tuple[tuple[re.Pattern[str] | None, ...], ...], reached: set[tuple[int, int]]
) -> frozenset[tuple[int, int]]:
    """`**` may also be no directory at all."""
    settled = set(reached)
    for index, first in reached:
        parts = first
        while parts < len(patterns[index]) and patterns[index][parts] is None:
            parts += 1
            settled.add((index, parts))
    return frozenset(settled)
