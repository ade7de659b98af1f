"""Requirements files, as pip has them: read into the lines that a job file carries.

Owns what only the machine with the file can do: the file itself, those that it includes by `-r` (counted from the file
that says so), and lines that go on after a backslash. What a line may say the server checks, once for everybody; `-c`
is refused here, because its file would be left behind.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import JobFileError

FIELD = "run.environment.requirements"
MAX_FILE_BYTES = 1 << 20
MAX_FILES = 100
MAX_LINES = 10_000
Place = tuple[str, int]  # a file and a line in it; 0 where it has none

_COMMENT = re.compile(r"(^|\s+)#.*$")
_INCLUDE = re.compile(r"(?P<option>-r|--requirement|-c|--constraint)(?:\s*=\s*|\s+|(?<=-[rc]))(?P<file>\S.*)?$")
_CONSTRAINTS = ("-c", "--constraint")


def read(path: str | Path, *, field: str = FIELD) -> list[str]:
    """The lines of a requirements file, with those of the files that it includes in their place. JobFileError says
    what is wrong, in which line of which file; `field` is what the file was given for."""
    return _Reading(field).file(Path(path), (), ("", 0))


def filled_in(document: Mapping[str, Any], *, base: Path = Path(), place: str = "") -> dict[str, Any]:
    """The job file with the lines of the requirements file that it names, if it does; counted from `base`. `place` is
    where in the job file it is named."""
    run = document.get("run")
    environment = run.get("environment") if isinstance(run, Mapping) else None
    given = environment.get("requirements") if isinstance(environment, Mapping) else None
    if not isinstance(run, Mapping) or not isinstance(environment, Mapping) or not isinstance(given, str | Path):
        return dict(document)
    lines = _Reading(FIELD).file(_path(given, base, place), (), (place, 0))
    return {**document, "run": {**run, "environment": {**environment, "requirements": lines}}}


def _path(given: str | Path, base: Path, place: str) -> Path:
    try:
        return base / Path(given).expanduser()
    except RuntimeError as error:
        raise JobFileError(f"{FIELD} is {str(given)!r}: {error}", path=place) from None


@dataclass
class _Reading:
    """One requirements file with all that it includes."""

    field: str
    files: int = 0
    lines: int = 0

    def file(self, path: Path, including: tuple[Path, ...], place: Place) -> list[str]:
        """The lines of one file; `including` are the files that led to it, and `place` is what names it."""
        self.files += 1
        if self.files > MAX_FILES:
            raise self._error(f"includes more than {MAX_FILES} files", place)
        text, real = self._text(path, place), path.resolve()
        if real in including:
            raise self._error(f"{path} includes itself", place)
        found: list[str] = []
        for number, line in _logical_lines(text):
            found += self._line(line, path, (str(path), number), (*including, real))
        return found

    def _line(self, line: str, path: Path, place: Place, including: tuple[Path, ...]) -> list[str]:
        include = _INCLUDE.match(_COMMENT.sub("", line).strip())
        if include is None:
            self.lines += 1
            if self.lines > MAX_LINES:
                raise self._error(f"more than {MAX_LINES} lines", place)
            return [line]
        option, names = include["option"], _words(include["file"])
        if option in _CONSTRAINTS:
            raise self._error(f"{option} is not taken here: pin the versions in the requirements themselves", place)
        if len(names) != 1 or "://" in names[0]:
            raise self._error(f"{option} takes one file on this machine", place)
        return self.file(path.parent / names[0], including, place)

    def _text(self, path: Path, place: Place) -> str:
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise self._error(f"cannot read {path}: {reason}", place) from None
        if len(raw) > MAX_FILE_BYTES:
            raise self._error(f"{path} has more than {MAX_FILE_BYTES} bytes", place)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise self._error("is not UTF-8 text", (str(path), line)) from None

    def _error(self, message: str, place: Place) -> JobFileError:
        return JobFileError(f"{self.field}: {message}", path=place[0], line=place[1])


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; one that ends in a backslash goes on in the next, as for pip."""
    begun, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first if begun else number
        is_comment = _COMMENT.match(line) is not None
        if line.endswith("\\") and not is_comment:
            begun += line.rstrip("\\")
            continue
        yield first, f"{begun} {line}" if begun and is_comment else begun + line
        begun = ""
    if begun:
        yield first, begun


def _words(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError:  # a quotation without an end
        return []
