"""Scripts that mean no good, on a real runner: each is contained, told about in words, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import isolation as isolation_module
from phalanx_worker.node.cgroups import Cgroup, Cgroups

pytestmark = pytest.mark.asyncio(loop_scope="session")

enforced = pytest.mark.skipif(
    {"memory", "cpu", "pids"} - Cgroups.find().parents.keys() != set(), reason="no control groups can be made here"
)


def living(text: str) -> list[int]:
    """Processes with that in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def cgroup_of(attempt: Any) -> Cgroup | None:
    (group,) = [each for each in attempt.runners[0]._groups() if each.order.attempt_id == attempt.id]
    return group.confinement.cgroup


def cgroups_left(name: str) -> list[Path]:
    return [parent / name for parent in Cgroups.find().parents.values() if (parent / name).exists()]


@pytest.fixture
def without_cgroups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(isolation_module.Cgroups, "find", classmethod(lambda cls: cls(problem="as in most containers")))
    yield


# ------------------------------------------------------------------ memory


@enforced
async def test_who_eats_memory_ends_alone_and_leaves_no_control_group(workbench: Any) -> None:
    quiet = await workbench.attempt("sleep 60").start()
    script = workbench.script("""
        import os
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 20)))
    """)
    hungry = workbench.attempt(f"python {script}", memory_bytes=200 << 20)
    (end,) = await hungry.run()
    assert (end["signal"], end["oom"]) == (signal.SIGKILL, True)
    assert end["reason"] == "ran out of memory: the limit is 200 MiB"
    await hungry.forget()
    assert cgroups_left(f"{hungry.id}-0") == []
    assert (await quiet.group(state="running"))["exits"] == []


@enforced
async def test_a_child_that_is_ended_for_memory_ends_the_attempt_as_oom(workbench: Any) -> None:
    """The kernel ends the largest process, which need not be a rank; the rank would wait for it, or exit with 1."""
    child = "import os; held = [os.urandom(1 << 20) for _ in range(1000)]"
    script = workbench.script(f"""
        import os, subprocess, sys, time
        if os.environ["RANK"] == "1":
            subprocess.run([sys.executable, "-c", {child!r}])
        time.sleep(60)
    """)
    exits = await workbench.attempt(f"python {script}", ranks=2, memory_bytes=200 << 20).run()
    assert [end["oom"] for end in exits] == [True, True]


@enforced
async def test_files_in_shared_memory_count_as_memory(workbench: Any) -> None:
    command = "head -c 300M /dev/zero > /dev/shm/large; sleep 60"
    (end,) = await workbench.attempt(command, memory_bytes=100 << 20).run()
    assert end["oom"], end


async def test_where_the_kernel_keeps_no_limit_the_runner_does(
    without_cgroups: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    assert "memory by watching" in runner.capabilities()["isolation"]
    command = "[ $RANK = 0 ] && sleep 60; python3 -c 'import os; held = [os.urandom(1 << 20) for _ in range(1000)]'"
    exits = await make_workbench([runner], server, tmp_path).attempt(command, ranks=2, memory_bytes=200 << 20).run()
    assert [(end["oom"], end["reason"][:10]) for end in exits] == [(True, "was ended "), (True, "ran out of")]


async def test_shared_memory_counts_where_the_runner_watches(
    without_cgroups: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    if runner._duties.launcher.isolation.private_problem:
        pytest.skip("no mounts of their own here")
    command = "head -c 300M /dev/zero > /dev/shm/large; sleep 60"
    (end,) = await make_workbench([runner], server, tmp_path).attempt(command, memory_bytes=100 << 20).run()
    assert end["oom"], end


# ------------------------------------------------------------------ CPU and processes


@enforced
async def test_cpu_time_is_limited_for_all_processes_together(workbench: Any) -> None:
    work = "import time; end = time.time() + 1.5\nwhile time.time() < end: pass\nprint(time.process_time())"
    command = f"""python3 -c '{work}' & python3 -c '{work}' & wait"""
    attempt = workbench.attempt(command, cpus=0.5)
    await attempt.run()
    used_s = sum(map(float, workbench.server.text(attempt.id, rank=0).split()))
    assert 0.3 < used_s < 1.2


async def test_without_control_groups_a_group_gets_cores_of_its_own(
    without_cgroups: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    runner = await light_runner(server)
    bench = make_workbench([runner], server, tmp_path)
    attempts = [bench.attempt("nproc; grep Cpus_allowed_list /proc/self/status; sleep 2", cpus=1) for _ in range(2)]
    for attempt in attempts:
        await attempt.start()
    for attempt in attempts:
        await attempt.exits()
    said = [server.text(attempt.id, rank=0).split() for attempt in attempts]
    assert [words[0] for words in said] == ["1", "1"]
    assert said[0][2] != said[1][2]


@enforced
async def test_a_fork_bomb_is_bounded_and_ends(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, most_processes=200)
    bench = make_workbench([runner], server, tmp_path)
    script = bench.script("""
        import os, time
        print("lit", flush=True)
        while True:
            try:
                os.fork()
            except OSError:
                time.sleep(0.01)
    """)
    bomb = await bench.attempt(f"env python3 {script}", memory_bytes=2 << 30).start()
    await bomb.printed("lit")
    await asyncio.sleep(0.5)
    cgroup = cgroup_of(bomb)
    assert cgroup is not None
    pids = next(Path(path) for path in cgroup.spec.directories if "pids" in path or cgroup.version == 2)
    assert 150 < int((pids / "pids.current").read_text()) <= 200
    quiet = await bench.attempt("echo starts").run()
    assert quiet[0]["exit_code"] == 0
    began = time.monotonic()
    await runner.kill_group(bomb.id)
    await bomb.exits()
    assert time.monotonic() - began < 10
    await bomb.forget()
    assert cgroups_left(f"{bomb.id}-0") == []
    assert living(script) == []
