"""Files that a job left: the requests, described as in `job_requests.py`, and how files come onto this machine.

Owns that a file appears whole and under its own hash or not at all, and never outside the directory that was asked for,
whatever the server says.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from urllib.parse import quote as quoted

from phalanx.answers import paged
from phalanx.bodies import chunks
from phalanx.calls import Download, Page, Pages, Steps, Work, clean
from phalanx.errors import OutputError, ProtocolError
from phalanx.globs import matcher, matches
from phalanx.models import Model


@dataclass(frozen=True)
class Output(Model):
    """One file. Those of several groups (nodes) of an attempt may have the same path."""

    path: str
    bytes: int = 0
    sha256: str = ""
    attempt: int = 0
    group_rank: int = 0
    created_at: datetime | None = None


@dataclass(frozen=True)
class Fetched:
    """An output as it lies here; `fresh` is False where it was there before."""

    output: Output
    file: Path
    fresh: bool


def outputs(job_id: str, *, attempt: int | None = None, limit: int | None = None) -> Pages[Output]:
    """The files that a job left, by path, as an iterator: of one attempt, or each of the newest that left that path."""
    return paged(Output, f"/v1/jobs/{quoted(job_id, safe='')}/outputs", limit=limit, attempt=attempt)


def download_output(
    job_id: str, path: str, file: Path, *, attempt: int | None = None, group_rank: int | None = None
) -> Download:
    """Fetch one output into a local file, which is overwritten as it comes; answers its SHA-256. The newest attempt and
    the lowest group that left it, unless said otherwise."""
    where = f"/v1/jobs/{quoted(job_id, safe='')}/outputs/{quoted(path)}"
    return Download(where, file, clean({"attempt": attempt, "group_rank": group_rank}))


def download_outputs(
    job_id: str,
    to: str | Path,
    *,
    patterns: Sequence[str] = (),
    attempt: int | None = None,
    group_rank: int | None = None,
) -> Steps[list[Fetched]]:
    """Fetch what a job left into the directory `to`, under the same paths: everything, or what fits a pattern
    (`*.pt`, `logs/**`). Of several groups with the same path the lowest is taken, or the one asked for."""
    found = yield from _all(outputs(job_id, attempt=attempt))
    fetched = []
    for output in chosen(found, patterns=patterns, group_rank=group_rank):
        fetched.append((yield from _fetched(job_id, output, Path(to))))
    return fetched


def chosen(
    found: Sequence[Output], *, patterns: Sequence[str] = (), group_rank: int | None = None, every_group: bool = False
) -> list[Output]:
    """Those that fit; of each path that of one group, unless `every_group`."""
    wanted = matcher(patterns or ["**"])
    fits = [one for one in found if matches(wanted, one.path) and group_rank in (None, one.group_rank)]
    if every_group:
        return fits
    by_path: dict[str, Output] = {}
    for one in sorted(fits, key=lambda one: one.group_rank):
        by_path.setdefault(one.path, one)
    return list(by_path.values())


def _all(pages: Pages[Output]) -> Steps[list[Output]]:
    found: list[Output] = []
    cursor: str | None = None
    while True:
        page: Page[Output] = yield pages(cursor)
        found += page.items
        cursor = page.next_cursor
        if cursor is None:
            return found


# ------------------------------------------------------------------ on this machine


def _fetched(job_id: str, output: Output, to: Path) -> Steps[Fetched]:
    with explained(output.path, to):
        file = _place(output.path, to)
        if (yield Work(partial(_is_there, file, output))):
            return Fetched(output, file, fresh=False)
        where = {"attempt": output.attempt, "group_rank": output.group_rank}
        fetch = partial(download_output, job_id, output.path, **where)
        yield from arrived(fetch, file, sha256=output.sha256, name=output.path)
    return Fetched(output, file, fresh=True)


def arrived(fetch: Callable[[Path], Download], file: Path, *, sha256: str, name: str = "") -> Steps[None]:
    """Fetch into `file`, which appears whole or not at all. Raises ProtocolError where it is damaged, and OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f".phalanx-{uuid.uuid4().hex}"
    try:
        digest: str = yield fetch(part)
        if digest != sha256:
            raise ProtocolError(f"{name or file.name} arrived damaged: its SHA-256 is {digest}, not {sha256}")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: str, to: Path) -> Iterator[None]:
    """What goes wrong with files here, as OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written into {to}: {error.strerror or error}") from None


def _place(path: str, to: Path) -> Path:
    """Where a path of the server's belongs; OutputError where that is not below `to`."""
    parts = path.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in path or (os.name == "nt" and {"\\", ":"} & set(path)):
        raise OutputError(f"{path!r} is no path to write to")
    file = to.joinpath(*parts)
    if not file.parent.resolve().is_relative_to(to.resolve()):
        raise OutputError(f"{path} leads out of {to}: there is a link on its way")
    return file


def _is_there(file: Path, output: Output) -> bool:
    if not file.is_file() or file.stat().st_size != output.bytes:
        return False
    digest = hashlib.sha256()
    for chunk in chunks(file):
        digest.update(chunk)
    return digest.hexdigest() == output.sha256
