"""What every rank of a group is doing, as text, from outside: py-spy reads the stacks of all threads of a process.

Owns the call and the files, `stacks/NAME/rank-N.txt` among the outputs of the job. A rank that cannot be read has the
reason in its file. The runner may be root and the directory is the rank's: it is walked by descriptors, no link on the
way is followed, and only what was made here is given to the rank's user.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 10.0
MOST_BYTES = 1 << 20  # of one rank
_AT_ONCE = 4
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


async def keep(pids: Mapping[int, int], output: Path, name: str, uid: int | None) -> int:
    """Write the stacks of these processes, by rank, into `stacks/name` below the directory `output`. How many could be
    read. Raises OSError where they cannot be written."""
    gate = asyncio.Semaphore(_AT_ONCE)
    ranks = sorted(pids)
    read = await asyncio.gather(*(_dump(pids[rank], gate) for rank in ranks))
    texts = dict(zip(ranks, (text for _, text in read), strict=True))
    await asyncio.to_thread(_write, texts, output, name, uid)
    return sum(was_read for was_read, _ in read)


async def _dump(pid: int, gate: asyncio.Semaphore) -> tuple[bool, str]:
    """(could it be read, its stacks or why not); what is longer than MOST_BYTES is cut."""
    program = Path(sys.executable).parent / "py-spy"
    async with gate:
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(program), "dump", "--pid", str(pid), "--subprocesses"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            return False, f"{program} cannot be run: {error}\n"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                output = await _read(process)
        except TimeoutError:
            return False, f"py-spy could not read the process within {TIMEOUT_S:.0f} s\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        return bool(output) and b"Thread " in output, output.decode(errors="replace")


async def _read(process: asyncio.subprocess.Process) -> bytes:
    """Its output to the end, or to MOST_BYTES."""
    assert process.stdout is not None
    output = b""
    while len(output) < MOST_BYTES and (more := await process.stdout.read(MOST_BYTES - len(output))):
        output += more
    return output


def _write(texts: Mapping[int, str], output: Path, name: str, uid: int | None) -> None:
    directory = os.open(output, _DIRECTORY)
    try:
        for part in ("stacks", name):
            inner = _enter(directory, part, uid)
            os.close(directory)
            directory = inner
        for rank, text in texts.items():
            descriptor = os.open(f"rank-{rank}.txt", _NEW_FILE, 0o644, dir_fd=directory)
            with open(descriptor, "w") as file:
                file.write(text)
                file.flush()
                _give(descriptor, uid)
    finally:
        os.close(directory)


def _enter(directory: int, name: str, uid: int | None) -> int:
    """A descriptor of that directory within the other, made if need be. Raises OSError where it is a link."""
    made = True
    try:
        os.mkdir(name, 0o755, dir_fd=directory)
    except FileExistsError:
        made = False
    inner = os.open(name, _DIRECTORY, dir_fd=directory)
    if made:
        _give(inner, uid)
    return inner


def _give(descriptor: int, uid: int | None) -> None:
    if uid is not None:
        os.fchown(descriptor, uid, uid)
