"""What every rank of a group is doing, as text, from outside: py-spy reads the stacks of all threads of a process.

Owns the call and the files, `stacks/NAME/rank-N.txt` among the outputs of the job. A rank that cannot be read has the
reason in its file.
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


async def keep(pids: Mapping[int, int], directory: Path, uid: int | None) -> int:
    """Write the stacks of these processes, by rank. How many could be read."""
    ranks = sorted(pids)
    read = await asyncio.gather(*(_dump(pids[rank]) for rank in ranks))
    await asyncio.to_thread(_write, dict(zip(ranks, (text for _, text in read), strict=True)), directory, uid)
    return sum(was_read for was_read, _ in read)


async def _dump(pid: int) -> tuple[bool, str]:
    """(could it be read, its stacks or why not)"""
    program = Path(sys.executable).parent / "py-spy"
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
            output, _ = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return False, f"py-spy could not read the process within {TIMEOUT_S:.0f} s\n"
    return process.returncode == 0, output[:MOST_BYTES].decode(errors="replace")


def _write(texts: Mapping[int, str], directory: Path, uid: int | None) -> None:
    """Into a directory that the rank's user can write: nothing there is followed or overwritten."""
    for path in (directory.parent, directory):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            _give(path, uid)
    for rank, text in texts.items():
        path = directory / f"rank-{rank}.txt"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with open(descriptor, "w") as file:
            file.write(text)
        _give(path, uid)


def _give(path: Path, uid: int | None) -> None:
    if uid is not None:
        os.chown(path, uid, uid, follow_symlinks=False)
