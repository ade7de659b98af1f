"""Where checkpoints lie: one directory each, on any storage that fsspec knows.

Owns names, manifests, checks and removal. A checkpoint is complete when its `manifest.json` is there: it is written
last, names every file with its size and SHA-256, and goes first when a checkpoint is removed, so whatever ends a
process, what has a manifest was whole. SHA-256, because any `sha256sum` can repeat the check, nothing that is damaged
passes, and hashlib computes it outside the interpreter's lock, faster than a rank's share of a storage takes it (1.3
GiB/s on a core of the machine where it was chosen; CRC-32 2.2, BLAKE2b 0.6). That something is not there, that it is
damaged, and that the storage does not say are three answers: nothing is given up or removed on the third. Knows no
torch and no ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any, Literal, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from phalanx.recipes.checkpoint import CheckpointConfig

log = logging.getLogger("phalanx.training.checkpoint")

MANIFEST = "manifest.json"
ASIDE = "manifest-set-aside.json"
PREFIX = "step-"
READ_BYTES = 1 << 22
READ_PAUSES_S = (0.5, 2.0, 5.0)  # between tries of what is needed to resume

Fault = Literal["unfinished", "damaged", "unreadable"]
_Answer = TypeVar("_Answer")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used: which one, why, and what to do."""


@dataclass(frozen=True)
class Sum:
    """What a file of a checkpoint has to be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself. `files` by name inside its directory."""

    step: int
    files: Mapping[str, Sum]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.files.values())

    def encoded(self) -> bytes:
        """As JSON that carries its own checksum."""
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": json.loads(body)}).encode()


def decoded(data: bytes) -> Manifest:
    """A manifest as it was encoded. Raises ValueError where a byte is another."""
    outer = json.loads(data)
    body = outer["manifest"]
    if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != outer["sha256"]:
        raise ValueError("its checksum does not fit")
    files = {name: Sum(**part) for name, part in body["files"].items()}
    return Manifest(step=body["step"], files=files, metrics=body["metrics"])


@dataclass(frozen=True)
class Entry:
    """A checkpoint's directory. One of `manifest` and `fault` is None: it has no manifest (`unfinished`), one that is
    not as it was written (`damaged`), or the storage did not say (`unreadable`); `problem` is that in words."""

    url: str
    step: int
    manifest: Manifest | None
    fault: Fault | None = None
    problem: str = ""


class Store:
    """The directory (or URL) that holds a job's checkpoints."""

    def __init__(self, url: str):
        self._system, self._root = url_to_fs(url)
        self._url = str(self._system.unstrip_protocol(self._root)) if "://" in url else self._root
        self.is_local = isinstance(self._system, LocalFileSystem)

    def url_of(self, step: int) -> str:
        return f"{self._url.rstrip('/')}/{PREFIX}{step:09d}"

    def entries(self, pauses_s: Sequence[float] = ()) -> list[Entry]:
        """What lies there, newest first; with pauses, what fails is tried again. Raises CheckpointError where the
        storage does not list it."""
        self._system.invalidate_cache()
        try:
            paths = _patiently(lambda: self._system.ls(self._root, detail=False), pauses_s)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise CheckpointError(f"the checkpoints in {self._url} cannot be listed ({error})") from error
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        steps = (int(name.removeprefix(PREFIX)) for name in names if name.removeprefix(PREFIX).isdecimal())
        return [self.entry(self.url_of(step), pauses_s) for step in sorted(set(steps), reverse=True)]

    def entry(self, url: str, pauses_s: Sequence[float] = ()) -> Entry:
        """The checkpoint in one directory, wherever it lies."""
        system, path = url_to_fs(url)
        step = int(digits) if (digits := path.rsplit(PREFIX, 1)[-1]).isdecimal() else -1
        try:
            data = _patiently(lambda: system.cat_file(f"{path}/{MANIFEST}"), pauses_s)
        except FileNotFoundError:
            return Entry(url, step, None, "unfinished", f"it has no {MANIFEST}: its writing was not finished")
        except Exception as error:  # not every storage raises OSError alone
            return Entry(url, step, None, "unreadable", f"its {MANIFEST} cannot be read ({error})")
        try:
            manifest = decoded(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Entry(url, step, None, "damaged", f"its {MANIFEST} is damaged ({error})")
        return Entry(url, manifest.step, manifest)

    def clear(self, step: int) -> None:
        """Remove what an earlier attempt left under this step."""
        self.remove(self.url_of(step))

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the checkpoint counts."""
        _, path = url_to_fs(self.url_of(manifest.step))
        if not self.is_local:
            self._system.pipe_file(f"{path}/{MANIFEST}", manifest.encoded())  # an object is there whole or not at all
            return
        partial = f"{path}/.{MANIFEST}"
        with self._system.open(partial, "wb") as stream:
            stream.write(manifest.encoded())
            stream.flush()
            os.fsync(stream.fileno())
        self._system.mv(partial, f"{path}/{MANIFEST}")
        for directory in (path, self._root):
            _sync_directory(directory)

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to those of a complete checkpoint. Never raises: they only say which ones are the best."""
        try:
            manifest = self.entry(self.url_of(step)).manifest
            if manifest is not None:
                self.complete(replace(manifest, metrics={**manifest.metrics, **metrics}))
        except Exception as error:
            log.warning("how good the checkpoint of step %d is could not be noted: %s", step, error)

    def set_aside(self, url: str) -> None:
        """Let a complete checkpoint no longer count; its files stay until something is pruned."""
        _, path = url_to_fs(url)
        with suppress(FileNotFoundError):
            self._system.mv(f"{path}/{MANIFEST}", f"{path}/{ASIDE}")

    def remove(self, url: str) -> None:
        """Remove a checkpoint, its manifest first."""
        _, path = url_to_fs(url)
        if not self._system.exists(path):
            return
        if self._system.exists(f"{path}/{MANIFEST}"):
            self._system.rm_file(f"{path}/{MANIFEST}")
        self._system.rm(path, recursive=True)

    def prune(self, config: CheckpointConfig, *, newest: int, keep_before: int | None = None) -> None:
        """Remove what is `superfluous` and what never became complete. Never raises: it is tidying up."""
        try:
            for entry in superfluous(self.entries(), config, keep_before=keep_before):
                if entry.step != newest:
                    self.remove(entry.url)
        except Exception as error:
            log.warning("old checkpoints in %s could not be removed: %s", self._url, error)


def superfluous(entries: Iterable[Entry], config: CheckpointConfig, *, keep_before: int | None = None) -> list[Entry]:
    """Those that are neither among the last nor among the best nor to go back to before a step, and those that are
    unfinished. What is damaged or could not be read stays: the next restore says so, and a person may still need it."""
    entries = list(entries)
    whole = [entry for entry in entries if entry.manifest is not None]
    last = sorted(whole, key=lambda entry: -entry.step)[: config.keep_last]
    sign = 1 if config.best == "lowest" else -1
    rated = [(sign * metric, -entry.step, entry) for entry in whole if (metric := _metric(entry, config)) is not None]
    best = [entry for _, _, entry in sorted(rated, key=lambda row: row[:2])][: config.keep_best]
    kept = [*last, *best, *(_around(whole, keep_before) if keep_before is not None else [])]
    return [entry for entry in entries if entry.fault in (None, "unfinished") and entry not in kept]


def _around(whole: Iterable[Entry], step: int) -> list[Entry]:
    """The newest one from before that step, and the oldest of the others, which takes its place when the step has moved
    on: else none would live long enough to."""
    ordered = sorted(whole, key=lambda entry: entry.step)
    older = [entry for entry in ordered if entry.step < step]
    return [*older[-1:], *ordered[len(older) :][:1]]


def damage(entry: Entry, names: Sequence[str], *, whole: bool, moved: Callable[[], None] = lambda: None) -> list[str]:
    """What is wrong with these files of a complete checkpoint: their sizes, and if `whole` their checksums too. Calls
    `moved` whenever something has been read. Raises CheckpointError where the storage does not say, asked several
    times."""
    assert entry.manifest is not None
    system, path = url_to_fs(entry.url)
    found = (_damage(system, f"{path}/{name}", entry.manifest.files[name], whole, moved) for name in names)
    return [problem for problem in found if problem]


def sum_of(stream: IO[bytes], moved: Callable[[], None] = lambda: None) -> Sum:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(READ_BYTES):
        digest.update(chunk)
        size += len(chunk)
        moved()
    return Sum(size, digest.hexdigest())


def _damage(system: Any, path: str, wanted: Sum, whole: bool, moved: Callable[[], None]) -> str | None:
    try:
        return _patiently(lambda: _difference(system, path, wanted, whole, moved), READ_PAUSES_S)
    except FileNotFoundError:
        return f"{path} is missing"
    except Exception as error:
        raise unreadable(f"{path} cannot be read ({error})") from error


def unreadable(problem: str) -> CheckpointError:
    return CheckpointError(
        f"{problem}, tried {len(READ_PAUSES_S) + 1} times; mend the storage and start again, or remove the checkpoint "
        "if it is lost"
    )


def _difference(system: Any, path: str, wanted: Sum, whole: bool, moved: Callable[[], None]) -> str | None:
    size = system.size(path)
    moved()
    if size != wanted.bytes:
        return f"{path} has {size} bytes instead of {wanted.bytes}"
    if whole:
        with system.open(path, "rb") as stream:
            found = sum_of(stream, moved)
        if found != wanted:
            return f"{path} has the SHA-256 {found.sha256[:16]}… instead of {wanted.sha256[:16]}…"
    return None


def _patiently(read: Callable[[], _Answer], pauses_s: Sequence[float]) -> _Answer:
    """What `read` gives, tried again after each pause where it fails. That there is no such file is an answer."""
    for pause_s in pauses_s:
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception as error:
            log.warning("the storage of checkpoints failed, asking again in %.1f s: %s", pause_s, error)
            time.sleep(pause_s)
    return read()


def _metric(entry: Entry, config: CheckpointConfig) -> float | None:
    value = entry.manifest.metrics.get(config.best_metric) if entry.manifest else None
    return value if value is not None and math.isfinite(value) else None


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
