"""Scripts that mean no good, on a real runner: each is contained, told about in words, and leaves nothing behind."""

# ruff: noqa: ASYNC240 - a test may look into /proc and at its own small files
from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import cgroups, disk
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
    monkeypatch.setattr(
        isolation_module.Cgroups, "find", classmethod(lambda cls: Cgroups(problem="as in most containers"))
    )
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
    script = workbench.script("""
        import os, time
        began = time.time()
        for _ in range(2):
            if os.fork() == 0:
                while time.time() < began + 1.5:
                    pass
                os._exit(0)
        os.wait(), os.wait()
        used = os.times()
        print((used.children_user + used.children_system) / (time.time() - began))
    """)
    attempt = workbench.attempt(f"python {script}", cpus=0.5)
    await attempt.run()
    assert float(workbench.server.text(attempt.id, rank=0)) < 0.7, "of a core; without a limit it is two"


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
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "MOST_PROCESSES", 200)
    runner = await light_runner(server)
    bench = make_workbench([runner], server, tmp_path)
    script = bench.script("""
        import os, time
        first = os.getpid()
        while True:
            try:
                os.fork()
            except OSError:
                if os.getpid() == first:
                    print("full", flush=True)
                    first = 0
                time.sleep(0.01)
    """)
    bomb = await bench.attempt(f"env python3 {script}", memory_bytes=2 << 30).start()
    await bomb.printed("full")
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


# ------------------------------------------------------------------ disk


@pytest.fixture
def eager_disk_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "INTERVAL_S", 0.2)


async def test_who_fills_the_disk_is_ended_and_told(
    eager_disk_watch: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, disk_bytes=20 << 20)
    bench = make_workbench([runner], server, tmp_path)
    quiet = await bench.attempt("head -c 1M /dev/zero > small; sleep 60").start()
    attempt = bench.attempt("head -c 30M /dev/zero > large; ln large again; sleep 60")
    (end,) = await attempt.run()
    assert end["signal"] == signal.SIGKILL and not end["oom"]
    assert end["reason"] == "wrote 30 MiB into its directories on this node; the allowance is 20 MiB"
    assert "wrote 30 MiB" in server.marks(attempt.id, "note")[0]["data"]["message"]
    assert (await quiet.group(state="running"))["exits"] == []


async def test_files_deep_down_count_and_are_cleared_away(
    eager_disk_watch: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, disk_bytes=30 << 20)
    script = """
import os, time
for _ in range(3000):
    os.mkdir("directory"); os.chdir("directory")
with open("large", "wb") as file:
    file.write(bytes(30 << 20))
time.sleep(60)
"""
    bench = make_workbench([runner], server, tmp_path)
    attempt = bench.attempt(f"env python3 {bench.script(script)}")
    (end,) = await attempt.run()
    assert end["reason"].startswith("wrote 4")  # 30 MiB and 4 KiB for each directory
    await attempt.forget()
    assert list(Path(runner._settings.data_dir, "attempts").iterdir()) == []


async def test_counting_is_cut_into_rounds_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "large").write_bytes(bytes(1 << 20))
    own = tmp_path / "own"
    own.mkdir()
    (own / "link").symlink_to("../elsewhere")
    for number in range(50):
        (own / f"{number}").write_bytes(bytes(4096 if number else 0))  # an empty one takes an inode, as a link does
    count = disk.Count([str(own), str(tmp_path / "absent")])
    rounds = 0
    while not count.known_bytes:
        count.go_on(time.monotonic())  # no time at all: one entry a round
        rounds += 1
    assert rounds == 52
    assert count.known_bytes == 51 * 4096
    (own / "0").unlink()
    count.go_on(time.monotonic() + 10)
    assert count.used_bytes == 50 * 4096


async def test_counting_many_directories_deep_down_takes_little_memory(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["x" * 200] * 15)
    deep.mkdir(parents=True)
    for number in range(5_000):
        (deep / f"{number}").mkdir()
    count = disk.Count([str(tmp_path)])
    tracemalloc.start()
    try:
        count.go_on(time.monotonic() + 60)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count.known_bytes > 0
    assert peak_bytes < 5_000 * 500


# ------------------------------------------------------------------ what is left behind, output, reports


async def test_who_ignores_every_signal_and_hides_in_daemons_is_gone_after_the_grace(workbench: Any) -> None:
    script = workbench.script("""
        import os, signal, time
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.environ.clear()
                    os.execv("/bin/sleep", ["sleep", "66.6"])
                os._exit(0)
            os.wait()
        print("ready", flush=True)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}").start()
    await attempt.printed("ready")
    began = time.monotonic()
    await attempt.runners[0].stop_group(attempt.id, 0.5)
    (end,) = await attempt.exits()
    assert end["signal"] == signal.SIGKILL
    assert 0.4 < time.monotonic() - began < 8
    assert living("66.6") == []


async def test_a_flood_of_output_is_cut_told_about_and_bothers_nobody(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server, heartbeat_s=0.2)
    bench = make_workbench([runner], server, tmp_path)
    before_kib = resident_kib()
    flood = await bench.attempt("timeout 3 yes 0123456789012345678901234567890; true", log_limit_bytes=1 << 20).start()
    quiet = await bench.attempt("for i in 1 2 3 4; do echo line $i; sleep 0.5; done").start()
    assert [end["exit_code"] for end in [*await quiet.exits(), *await flood.exits()]] == [0, 0]
    assert resident_kib() - before_kib < 64 << 10
    assert len(server.text(flood.id, rank=0)) == 1 << 20
    (dropped,) = server.marks(flood.id, "dropped")
    assert dropped["data"]["what"] == "logs" and dropped["data"]["bytes"] > 1 << 20
    assert server.text(quiet.id, rank=0).count("line") == 4
    wanted = {"attempt_id": quiet.id, "epoch": quiet.desired.epoch}
    beats = [
        each["sent_at"] for each in server.reports if each["heartbeat"] and wanted in each["heartbeat"]["attempts"]
    ]
    assert max(later - earlier for earlier, later in pairwise(beats)) < 1.5


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)


async def test_ten_thousand_metrics_a_second_are_thinned_and_counted(workbench: Any) -> None:
    script = workbench.script("""
        import time, phalanx
        began = time.time()
        for step in range(20_000):
            phalanx.report(step=step, loss=1.0 / (step + 1), noise=float("nan"))
            if (ahead := step / 10_000 - (time.time() - began)) > 0.01:
                time.sleep(ahead)
    """)
    attempt = workbench.attempt(f"python {script}", cpus=0)
    other = workbench.script("import phalanx; phalanx.report(step=1, loss=2.0)", name="other.py")
    quiet = await workbench.attempt(f"python {other}").start()
    assert (await attempt.run())[0]["exit_code"] == 0
    await quiet.exits()
    server = workbench.server
    points = server.items("metrics", attempt.id)
    assert 100 < len(points) < 1_000
    assert points[0]["values"] == {"loss": 1.0, "noise": "nan"}
    dropped = sum(mark["data"]["count"] for mark in server.marks(attempt.id, "dropped"))
    assert dropped > 10_000
    assert [point["values"] for point in server.items("metrics", quiet.id)] == [{"loss": 2.0}]


async def test_a_rank_that_hangs_after_another_ended_well_goes_on_unless_the_job_says_otherwise(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    """Nobody but its owner can tell it from one that waits for a rank elsewhere: its time limit ends it."""
    runner = await light_runner(server)
    bench = make_workbench([runner], server, tmp_path)
    command = "[ $RANK = 0 ] || sleep 60"
    patient = await bench.attempt(command, ranks=2).start()
    told = bench.attempt(command, ranks=2, env={"PHALANX_STRAGGLER_S": "0.5"})
    done, hanging = await told.run()
    assert (done["exit_code"], hanging["signal"]) == (0, signal.SIGTERM)
    group = await patient.group(state="running")
    assert [(end["rank"], end["exit_code"]) for end in group["exits"]] == [(0, 0)]


# ------------------------------------------------------------------ others' files


async def test_ranks_of_one_tenant_reach_nothing_of_another_or_of_the_node(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives ranks users of their own")
    data = Path(tempfile.mkdtemp(prefix="phx-hostile-"))
    data.chmod(0o755)
    try:
        runner = await light_runner(server, name=str(data / "node"), own_users=True)
        if not runner._duties.launcher.own_users:
            pytest.skip(runner._duties.own_users_problem)
        bench = make_workbench([runner], server, tmp_path)
        victim = await bench.attempt("echo s3cret > weights; sleep 60", uid=70001).start()
        (group,) = runner._groups()
        pid = victim.starts[0]["pid"]
        files = [f"{group.places.work}/weights", f"/proc/{pid}/environ", f"/proc/{pid}/cwd/weights"]
        files += [f"/proc/{other}/environ" for other in (os.getpid(), group.guardian_pid)]
        directories = [group.places.work, group.places.tmp, group.places.home, f"{data}/node/spool"]
        directories += [f"/proc/{pid}/root/dev/shm", f"/proc/{os.getpid()}/fd"]
        tries = [f"cat {path} && echo REACHED {path}" for path in files]
        tries += [f"ls {path} && echo REACHED {path}" for path in directories]
        forbidden = [f"kill -9 {pid} && echo KILLED"]
        cgroup = cgroup_of(victim)
        forbidden += [f"echo 0 > {file} && echo JOINED" for file in (cgroup.spec.join if cgroup else [])]
        thief = bench.attempt("; ".join([*tries, *forbidden, "id -u"]), uid=70002)
        assert (await thief.run())[0]["exit_code"] == 0
        assert server.text(thief.id, rank=0) == "70002\n"
        assert (await victim.group(state="running"))["exits"] == []
    finally:
        shutil.rmtree(data, ignore_errors=True)
