"""A runner that has started and forgotten many groups is no larger than before: no file, task or object is left."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

AT_ONCE = 8
RSS_MAX_BYTES = 16 << 20


def of_ours() -> Counter[str]:
    """How many objects of each class of the runner there are."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("phalanx_worker.node"))


async def play(runner: Any, server: Any, make_workbench: Any, directory: Path, groups: int) -> None:
    bench = make_workbench([runner], server, directory)

    async def one() -> None:
        attempt = bench.attempt("true")
        assert [end["exit_code"] for end in await attempt.run()] == [0]
        await attempt.forget()

    for _ in range(groups // AT_ONCE):
        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        server.reports.clear()
        bench.attempts.clear()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [int(os.environ.get("FLAT_GROUPS", "400"))])
async def test_nothing_is_left_of_groups_that_ended(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, groups: int
) -> None:
    runner, process = await light_runner(server), psutil.Process()
    await play(runner, server, make_workbench, tmp_path, 40)
    objects, files, rss = of_ours(), process.num_fds(), process.memory_info().rss
    tasks, children = len(asyncio.all_tasks()), len(process.children(recursive=True))
    await play(runner, server, make_workbench, tmp_path, groups)
    await asyncio.sleep(0)
    assert sum((of_ours() - objects).values()) < groups / 4, of_ours() - objects
    assert process.num_fds() <= files + 2
    assert len(asyncio.all_tasks()) <= tasks + 2
    assert len(process.children(recursive=True)) <= children
    assert process.memory_info().rss < rss + RSS_MAX_BYTES
    print(f"{groups} groups: {(process.memory_info().rss - rss) / 1024:+.0f} KiB, {process.num_fds() - files:+d} files")
    assert not os.listdir(tmp_path / "light" / "attempts")  # noqa: PTH208 - a name is enough
