"""One environment built by pip in a directory of its own, within bounds of time and space, and sealed afterwards.

Owns the build's process, its environment variables, and what its end means: whether another try would end the same.
Knows neither which environments there are nor who waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import time
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from phalanx.units import duration_text

from phalanx_worker.node.cgroups import Cgroup, Cgroups, Limits
from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.threads import to_its_end
from phalanx_worker.runtime import builder, confine
from phalanx_worker.runtime.spec import CgroupSpec

BUILD_TIMEOUT_S = 1_800.0
MOST_BYTES = 10 << 30  # of one environment
_PROBE_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.05
_MEASURE_EVERY_S = 5.0
_KILLED_S = 10.0
_LOG_BYTES = 64 * 1024  # of its end, which are read
_TOLD_LINES = 6
_TOLD_CHARS = 700

# Where an operator says that packages come from; beside /etc/pip.conf. Builds see them, so they must hold no password.
OPERATORS_VARIABLES = frozenset(
    {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_TRUSTED_HOST", "PIP_CERT"}
    | {"PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "PIP_RETRIES"}
)

# All that the node's Python has: a requirement that it meets already is not installed again.
_PROBE = """
import importlib.metadata, json, sys
had = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()})
print(json.dumps([sys.version, sys.prefix, had]))
"""

# Signs of the network, the disk or the node in pip's output: then the requirements may be right.
_PASSING = re.compile(
    r"Retrying \(|Max retries exceeded|Connection(Error| refused| reset| aborted)|Connection broken|timed out"
    r"|Temporary failure in name resolution|Name or service not known|Network is unreachable|ProxyError|SSLError"
    r"|IncompleteRead|HTTP error (429|5\d\d)|\b5\d\d Server Error|No space left on device|[Dd]isk quota exceeded"
    r"|Cannot allocate memory|MemoryError|Killed signal terminated|exit code: -9\b|No module named '?pip\b"
    r"|Input/output error|Read-only file system|Too many open files|Resource temporarily unavailable"
)
_TELLING = re.compile(r"\s*(ERROR:|error:|×|[\w.]*(Error|Exception)\b:)")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class PipBuild:
    """`env` is what a build gets of the runner's environment, scrubbed already."""

    python: str
    env: Mapping[str, str]
    cgroups: Cgroups
    timeout_s: float = BUILD_TIMEOUT_S

    async def fingerprint(self) -> str:
        """What an environment stands on: the node's Python and all that it has. Raises StartFailed."""
        try:
            return await asyncio.to_thread(self._probe)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise StartFailed(f"the node's Python cannot be asked what it has: {error}") from error

    async def build(self, place: Path, log_path: Path, lines: list[str], *, uid: int | None, most_bytes: int) -> None:
        """Build into the new directory `place` and take the tenant's hands off it. Raises StartFailed."""
        await to_its_end(_prepare, place, lines, uid)
        cgroup = self._cgroup()
        try:
            process = self._spawn(place, log_path, uid, cgroup.spec)
        except OSError:
            cgroup.remove()
            raise
        try:
            async with asyncio.timeout(self.timeout_s):
                code = await _ended(process, place, log_path, most_bytes)
        except TimeoutError:
            raise StartFailed(f"its environment was not built in {duration_text(self.timeout_s)}") from None
        finally:
            await to_its_end(_end, process, cgroup)
        if code != 0:
            raise failure(code, await asyncio.to_thread(_tail, log_path))
        await to_its_end(_seal, place, uid)

    def _probe(self) -> str:
        asked = subprocess.run(
            [self.python, "-c", _PROBE], env=dict(self.env), cwd="/", capture_output=True, timeout=_PROBE_TIMEOUT_S
        )
        asked.check_returncode()
        return json.dumps([self.python, *json.loads(asked.stdout)])

    def _cgroup(self) -> Cgroup:
        """Of its own: other runners of this host may build the same."""
        return self.cgroups.make(f"environment-{uuid.uuid4().hex}", Limits())

    def _spawn(self, place: Path, log_path: Path, uid: int | None, cgroup: CgroupSpec) -> subprocess.Popen[bytes]:
        env = {**self.env, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        arguments = [str(place), str(-1 if uid is None else uid), json.dumps(dataclasses.asdict(cgroup))]
        log_path.touch(mode=0o600)  # it names packages and where they come from: not for other tenants
        with open(log_path, "wb") as log:
            return subprocess.Popen(
                [self.python, "-P", "-m", builder.__name__, *arguments],
                stdin=subprocess.PIPE,  # its lifeline
                stdout=log,
                stderr=log,
                env=env,
                cwd="/",
                start_new_session=True,
            )


def failure(code: int, output: str) -> StartFailed:
    """What pip's end means. Permanent where pip itself refused."""
    if code >= 128:
        return StartFailed(f"its environment could not be built: pip was ended by signal {code - 128}")
    permanent = code != builder.BROKEN and not _PASSING.search(output)
    return StartFailed(f"its environment could not be built: {telling_lines(output)}", permanent=permanent)


def telling_lines(output: str) -> str:
    """The last lines that say what went wrong, as one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = list(dict.fromkeys(line for line in lines if _TELLING.match(line)))
    told = "; ".join(telling[-_TOLD_LINES:] or lines[-_TOLD_LINES:] or ["pip said nothing"])
    told = "".join(char if char.isprintable() else "?" for char in _CREDENTIALS.sub("", told))
    return told if len(told) <= _TOLD_CHARS else f"…{told[-_TOLD_CHARS:]}"


async def _ended(process: subprocess.Popen[bytes], place: Path, log_path: Path, most_bytes: int) -> int:
    """Its exit code. Raises StartFailed as soon as it takes too much."""
    measured_s = time.monotonic()
    while (code := process.poll()) is None:
        if time.monotonic() - measured_s > _MEASURE_EVERY_S:
            await _expect_size(place, log_path, most_bytes)
            measured_s = time.monotonic()
        await asyncio.sleep(_LOOK_EVERY_S)
    await _expect_size(place, log_path, most_bytes)
    return code


async def _expect_size(place: Path, log_path: Path, most_bytes: int) -> None:
    if await to_its_end(measure, place, log_path) > most_bytes:
        raise StartFailed(f"its environment takes more than {most_bytes >> 20} MiB")


def measure(directory: Path, *files: Path) -> int:
    """Bytes on disk of everything below, and of these files."""
    paths = (f"{parent}/{name}" for parent, _, names in os.walk(directory) for name in names)
    return sum(_size(path) for path in (*paths, *map(str, files)))


def _size(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path).st_blocks * 512
    return 0


def _prepare(place: Path, lines: list[str], uid: int | None) -> None:
    place.mkdir(mode=0o700)
    (place / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))
    for path in (place / "home", place / "tmp"):
        path.mkdir(mode=0o700)
    if uid is not None:
        for path in (place / "home", place / "tmp", place / "requirements.txt", place):
            os.chown(path, uid, uid)


def _end(process: subprocess.Popen[bytes], cgroup: Cgroup) -> None:
    """Cut its lifeline: it kills what is below it and ends."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_KILLED_S)
    except subprocess.TimeoutExpired:
        confine.end(cgroup.spec)
        process.kill()
        process.wait()
    cgroup.remove()


def _seal(place: Path, uid: int | None) -> None:
    """Nobody but root changes it any more, and other tenants do not read it. No link is followed anywhere: it is the
    tenant's work, who may have meant harm. Raises StartFailed for a link to what is not the tenant's."""
    if uid is not None:
        os.chown(place, 0, uid)
        place.chmod(0o700)  # no other process of the tenant comes in meanwhile
    for name in ("home", "tmp"):
        shutil.rmtree(place / name, ignore_errors=True)
    if uid is None:
        return
    sealed: set[int] = set()
    for _, directories, files, parent_fd in os.fwalk(place, follow_symlinks=False):
        for name in (*directories, *files):
            sealed.add(_seal_entry(name, parent_fd, uid, sealed))  # directories too, before what is in them is listed
    place.chmod(0o750)


def _seal_entry(name: str, parent_fd: int, uid: int, sealed: Set[int]) -> int:
    """Its owner changes before its mode: then nobody else can change it back. Its inode is answered; `sealed` has those
    before it."""
    found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    if found.st_uid != uid and found.st_ino not in sealed:  # a hard link: it would change wherever else it is
        raise StartFailed(f"its environment has a link {name!r}, which belongs to user {found.st_uid}")
    os.chown(name, 0, uid, dir_fd=parent_fd, follow_symlinks=False)
    mode = os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode
    if not stat.S_ISLNK(mode):
        os.chmod(name, (mode & 0o700) | (mode & 0o500) >> 3, dir_fd=parent_fd)
    return found.st_ino


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        return file.read().decode(errors="replace")
