"""The environments of one node: each built once, kept within a bound, never removed while somebody uses it.

Owns `<data>/environments`: `<key>/` for each, beside it `<key>.log` with pip's output and, once it is complete,
`<key>.json`, without which it counts for nothing: what a runner was building when it died is thrown away by the next.
(Beside and not inside, where a build may have put a link.) A key is the hash of what the environment stands on (the
node's Python and what that has), of the user that built it, since building runs code of packages and tenants do not
share, and of its lines. How one is built is passed in (`pip_build.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from phalanx.units import duration_text

from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.pip_build import MOST_BYTES, PipBuild, measure
from phalanx_worker.node.threads import to_its_end
from phalanx_worker.protocol import Fill

MOST_BUILDS = 2  # at once; of one tenant that has its own user, one
WAIT_TIMEOUT_S = 3_600.0  # for a build, those before it included
_GONE = ".gone"
_FAILED_LOG = "failed.log"  # of the last build that failed

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """A complete environment. `provides`: the names of modules that it brings; `size_bytes` what it takes."""

    key: str
    venv: str
    provides: frozenset[str]
    size_bytes: int

    @property
    def python(self) -> str:
        return f"{self.venv}/bin/python"


@dataclass(frozen=True)
class Wanted:
    """`uid` builds it and owns the ranks that use it; None: the runner's own user does."""

    lines: tuple[str, ...]
    uid: int | None


@dataclass
class _Build:
    task: asyncio.Task[tuple[Built, float]]  # and how many seconds it took
    waiters: int = 0


@dataclass
class Environments:
    """`used` names, by key, those that groups or warm processes use or soon will, besides the ones held here."""

    directory: Path
    builder: PipBuild
    limit_bytes: int
    used: Callable[[], Iterable[str]]
    _held: Counter[str] = field(default_factory=Counter)
    _builds: dict[str, _Build] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_BUILDS))
    _turns: dict[int, asyncio.Lock] = field(default_factory=dict)  # by user
    _fingerprint: str | None = None
    _size_bytes: int = 0
    _removals: set[asyncio.Future[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Throws away what an earlier runner left half done. Other tenants may not list what is there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o711)  # whatever the runner's umask is: tenants have to get to what is theirs
        complete = {path.stem for path in self.directory.glob("*.json") if (self.directory / path.stem).is_dir()}
        for entry in self.directory.iterdir():
            if entry.is_dir() and entry.name not in complete:
                self._remove(entry)
            elif entry.name.partition(".")[0] not in complete:
                entry.unlink()

        self._size_bytes = sum(built.size_bytes for built in self._complete())

    @property
    def fill(self) -> Fill:
        """Those that are complete, as of the last build."""
        return Fill(self._size_bytes, self.limit_bytes)

    @property
    def held(self) -> frozenset[str]:
        return frozenset(self._held)

    def key(self, wanted: Wanted) -> str:
        """Empty while nothing was asked for yet, and so nothing can be used."""
        if self._fingerprint is None:
            return ""
        named = json.dumps([self._fingerprint, wanted.uid, wanted.lines])
        return hashlib.sha256(named.encode()).hexdigest()[:32]

    def _said(self, key: str) -> Path:
        """What is said of a complete environment; used last when the file was changed last."""
        return self.directory / f"{key}.json"

    def warm_log_path(self, key: str) -> Path:
        return self.directory / f"{key}.warm.log"

    @asynccontextmanager
    async def hold(self, wanted: Wanted, tell: Tell) -> AsyncIterator[Built]:
        """The environment, built if need be; it is not removed meanwhile. Raises StartFailed."""
        if self._fingerprint is None:
            self._fingerprint = await self.builder.fingerprint()
        key = self.key(wanted)
        self._held[key] += 1
        try:
            built = self._read(key) or await self._wait_for_build(key, wanted, tell)
            os.utime(self._said(key))  # most recently used
            yield built
        finally:
            self._held[key] -= 1
            self._held += Counter()  # drops those that nobody holds

    async def close(self) -> None:
        """End every build."""
        builds = [build.task for build in self._builds.values()]
        for task in builds:
            task.cancel()
        await asyncio.gather(*builds, *self._removals, return_exceptions=True)

    # -------------------------------------------------------------- building

    async def _wait_for_build(self, key: str, wanted: Wanted, tell: Tell) -> Built:
        while (build := self._builds.get(key)) is not None and build.task.cancelling():
            await asyncio.wait([build.task])
        if build is None:
            build = self._builds[key] = _Build(asyncio.create_task(self._build(key, wanted)))
            build.task.add_done_callback(lambda _: self._builds.pop(key))
        build.waiters += 1
        tell(f"building its environment ({describe(wanted.lines)})")
        try:
            async with asyncio.timeout(WAIT_TIMEOUT_S):
                built, took_s = await asyncio.shield(build.task)
        except TimeoutError:
            raise StartFailed(f"its environment was not built within {duration_text(WAIT_TIMEOUT_S)}") from None
        finally:
            build.waiters -= 1
            if not build.waiters and not build.task.done():
                await _cancelled(build.task)
        tell(f"its environment was built in {duration_text(took_s)}")
        return built

    async def _build(self, key: str, wanted: Wanted) -> tuple[Built, float]:
        place, log_path = self.directory / key, self.directory / f"{key}.log"
        try:
            async with self._turn(wanted.uid), self._slots:
                begun_s = time.monotonic()
                self._throw_away(key)  # what could not be removed before
                try:
                    await self._build_in(place, log_path, wanted)
                except BaseException:
                    with contextlib.suppress(FileNotFoundError):
                        log_path.rename(self.directory / _FAILED_LOG)
                    self._throw_away(key)
                    raise
                self._evict()
                built = self._read(key)
                assert built is not None
                return built, time.monotonic() - begun_s
        except OSError as error:
            raise StartFailed(f"its environment could not be built: {error}") from error

    def _turn(self, uid: int | None) -> AbstractAsyncContextManager[None]:
        """One after another, so that a tenant whose builds hang leaves room for others."""
        return nullcontext() if uid is None else self._turns.setdefault(uid, asyncio.Lock())

    async def _build_in(self, place: Path, log_path: Path, wanted: Wanted) -> None:
        most_bytes = min(MOST_BYTES, self.limit_bytes)
        await self.builder.build(place, log_path, list(wanted.lines), uid=wanted.uid, most_bytes=most_bytes)
        await to_its_end(_complete, place, self._said(place.name))

    def _read(self, key: str) -> Built | None:
        """None where there is none that is complete."""
        try:
            said = json.loads(self._said(key).read_text())
            return Built(key, str(self.directory / key / "venv"), frozenset(said["provides"]), int(said["size_bytes"]))
        except (OSError, ValueError, KeyError):
            return None

    # -------------------------------------------------------------- removing

    def _evict(self) -> None:
        """Remove the least recently used until the rest is within the bound, or in use."""
        kept = self._complete()
        spared = {*self._held, *self._builds, *self.used()}
        total_bytes = sum(built.size_bytes for built in kept)
        for built in kept:
            if total_bytes > self.limit_bytes and built.key not in spared:
                total_bytes -= built.size_bytes
                self._throw_away(built.key)
        self._size_bytes = total_bytes

    def _complete(self) -> list[Built]:
        """All that are here, the least recently used first."""
        complete = sorted(self.directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return [built for path in complete if (built := self._read(path.stem))]

    def _throw_away(self, key: str) -> None:
        """It is gone at once for everybody; its files go one by one."""
        for path in (self._said(key), self.directory / f"{key}.log", self.warm_log_path(key)):
            path.unlink(missing_ok=True)
        self._remove(self.directory / key)

    def _remove(self, place: Path) -> None:
        gone = place.with_name(f"{place.name.partition('.')[0]}{_GONE}-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            place.rename(gone)
            removal = asyncio.ensure_future(asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)


def describe(lines: Iterable[str]) -> str:
    """Such as "3 packages: einops==0.8.1, …"."""
    packages = [line for line in lines if not line.startswith("-")]
    named = packages[0].partition("@")[0].partition(";")[0].strip()[:60] if packages else ""
    more = ", …" if len(packages) > 1 else ""
    return f"{len(packages)} package{'' if len(packages) == 1 else 's'}: {named}{more}" if packages else "no packages"


def _complete(place: Path, said_path: Path) -> None:
    """The last step, and in one: from now on it counts."""
    said = {"size_bytes": measure(place), "provides": sorted(_modules(place / "venv"))}
    part = said_path.with_suffix(".part")
    part.write_text(json.dumps(said))
    part.rename(said_path)


def _modules(directory: Path) -> set[str]:
    """Names that can be imported from the environment itself."""
    entries = directory.glob("lib/python3*/site-packages/*")
    return {entry.name.partition(".")[0] for entry in entries if entry.suffix not in (".dist-info", ".pth")}


async def _cancelled(task: asyncio.Task[object]) -> None:
    """Cancel it and see it ended, even when this is cancelled meanwhile."""
    task.cancel()
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # it ended by itself at that moment, and nobody else asks how
