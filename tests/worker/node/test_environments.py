"""Environments built by a real pip, mostly of packages made on the spot, and the processes that start in them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.agent.launch import PREPARE_TIMEOUT_S
from phalanx_worker.node import cgroups, pip_build, service
from phalanx_worker.node import environments as environments_module
from phalanx_worker.node import interpreters as interpreters_module
from phalanx_worker.node.cgroups import Cgroups
from phalanx_worker.node.environments import Built, Environments, Wanted, describe
from phalanx_worker.node.interpreters import IDLE_S, MOST_WARM, Interpreter, Interpreters
from phalanx_worker.node.orders import StartFailed
from phalanx_worker.node.pip_build import failure
from phalanx_worker.node.warm import WarmState
from phalanx_worker.protocol import Environment
from phalanx_worker.runtime import linux
from tiny_packages import lines, sdist, wheel

pytestmark = pytest.mark.asyncio(loop_scope="session")

PRINT_TINY = """
    import sys, torch, phx_tiny
    print(phx_tiny.VALUE, sys.prefix == sys.exec_prefix != sys.base_prefix, sys.executable.startswith(sys.prefix))
"""
HANGING_BACKEND = """
    import os, subprocess, sys, time
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True, env={{}})
    with open("{0}", "w") as file:
        file.write(f"{{os.getpid()}} {{daemon.pid}} \\n")
    time.sleep(600)
"""

# Never the same process for long, so that looking for it finds none; ends by itself, should nobody end it.
FLEEING_BACKEND = """
    import os, time
    until = time.monotonic() + 5
    if os.fork():
        open("{0}", "w").close()
        time.sleep(600)
    while time.monotonic() < until:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            time.sleep(0.01)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    wheel(directory, "phx_tiny", "1.0", {"phx_tiny.py": "VALUE = 'tiny'"})
    sdist(directory, "phx_broken", "1.0", "raise RuntimeError('there is no compiler for this')")
    return directory


def kept_in(directory: Path) -> set[str]:
    return {path.stem for path in directory.glob("*.json")}


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def environments_of(runner: Any) -> Environments:
    return runner._duties.launcher.interpreters.environments


def complete(runner: Any) -> list[Path]:
    return sorted(environments_of(runner).directory.glob("*.json"))


def told(bench: Any, attempt: Any) -> list[str]:
    return [mark["data"]["message"] for mark in bench.server.marks(attempt.id, "environment")]


@pytest.mark.slow
async def test_two_attempts_at_once_build_it_once_and_start_warm_in_it(workbench: Any, packages: Path) -> None:
    environment = Environment(lines(packages, "phx-tiny==1.0"), name="tiny")
    script = workbench.script(PRINT_TINY)
    pair = [workbench.attempt(f"python {script}", environment=environment) for _ in range(2)]
    before = len(complete(workbench.runners[0]))
    exits = await asyncio.gather(*(attempt.run() for attempt in pair))
    assert [end["exit_code"] for (end,) in exits] == [0, 0], exits
    for attempt in pair:
        assert attempt.starts[0]["warm"], attempt.starts[0]["cold_reason"]
        assert workbench.server.text(attempt.id, rank=0) == "tiny True True\n"
        building, built = told(workbench, attempt)
        assert building == "building its environment (1 package: phx-tiny==1.0) on node-0"
        assert built.startswith("its environment was built in ") and built.endswith(" s on node-0")
    assert len(complete(workbench.runners[0])) == before + 1

    shell = workbench.attempt(
        "pip list --no-index | grep phx; python -c 'import phx_tiny, torch'", environment=environment
    )
    assert (await shell.run())[0]["exit_code"] == 0
    assert workbench.server.text(shell.id, rank=0).split() == ["phx_tiny", "1.0"]
    assert told(workbench, shell) == [], "it was there"


async def test_ranks_outlive_the_warm_process_of_their_environment(workbench: Any, packages: Path) -> None:
    environment = Environment(lines(packages, "phx-tiny==1.0"))
    go = workbench.directory / "go"
    script = workbench.script(f"""
        import os, time, phx_tiny
        print("up", flush=True)
        while not os.path.exists({str(go)!r}):
            time.sleep(0.01)
    """)
    attempt = await workbench.attempt(f"python {script}", environment=environment).start()
    await attempt.printed("up")
    interpreters = workbench.runners[0]._duties.launcher.interpreters
    (key,) = interpreters.warm_keys
    warm = interpreters._kept[key].warm
    assert warm.state.pid != workbench.runners[0]._duties.warm.state.pid
    interpreters.close_idle(0.0, most=0)
    await asyncio.gather(*interpreters._closing)
    assert linux.stat_fields(warm.state.pid) is None
    assert key in set(environments_of(workbench.runners[0]).used()), "its ranks use it"
    go.touch()
    assert (await attempt.exits())[0]["exit_code"] == 0


@pytest.mark.slow
async def test_what_is_prepared_stays_until_its_ranks_start_or_it_is_given_up(workbench: Any, packages: Path) -> None:
    """Other nodes of the gang may still build for long."""
    runner, environment = workbench.runners[0], Environment(lines(packages, "phx-tiny==1.0"))
    interpreters = runner._duties.launcher.interpreters
    started, given_up = (workbench.attempt("true", environment=environment) for _ in range(2))

    def in_use() -> bool:
        interpreters.close_idle(0.0, most=0)
        key = interpreters.environments.key(Wanted(tuple(environment.requirements), None))
        return key in set(interpreters.environments.used())

    for attempt in (started, given_up):
        await runner.prepare_group(await attempt.order(0, {"host": "127.0.0.1", "port": 0}))
        assert in_use()
    await started.run()
    assert in_use(), "the other one is to start yet"
    assert [ref.attempt_id for ref in runner._present()] == [given_up.id]
    await runner.kill_group(given_up.id)
    assert not in_use() and not runner._present()


async def test_what_is_prepared_for_an_agent_that_died_is_not_kept_for_ever(
    workbench: Any, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed in each heartbeat, a lost attempt would hold its GPUs for as long as the runner lives."""
    runner, environment = workbench.runners[0], Environment(lines(packages, "phx-tiny==1.0"))
    attempt = workbench.attempt("true", environment=environment)
    order = await attempt.order(0, {"host": "127.0.0.1", "port": 0})
    await runner.prepare_group(order)
    assert [ref.attempt_id for ref in runner._present()] == [attempt.id]
    assert service.PREPARED_S >= PREPARE_TIMEOUT_S, "an agent that lives still waits for the other nodes"
    monkeypatch.setattr(service, "PREPARED_S", 0.0)
    await runner.prepare_group(order)
    assert not runner._present() and not runner._prepared


async def test_a_fork_of_the_base_enters_an_environment(
    workbench: Any, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ranks have their tenant's user; here they keep the runner's, since torch need not be open to others."""
    interpreters = workbench.runners[0]._duties.launcher.interpreters
    choose, kept = interpreters._interpreter, interpreters.warm_keys
    monkeypatch.setattr(interpreters, "_interpreter", lambda built, uid: choose(built, 70123))
    script = workbench.script(
        PRINT_TINY + "    import subprocess; subprocess.run([sys.executable, '-c', 'import phx_tiny'])\n"
    )
    attempt = workbench.attempt(f"python {script}", environment=Environment(lines(packages, "phx-tiny==1.0")))
    assert (await attempt.run())[0]["exit_code"] == 0
    assert attempt.starts[0]["warm"]
    assert workbench.server.text(attempt.id, rank=0) == "tiny True True\n"
    assert workbench.server.text(attempt.id, rank=0, stream="stderr") == ""
    assert interpreters.warm_keys == kept


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("phx-nosuch==1", "No matching distribution found for phx-nosuch==1"),
        ("phx-broken==1.0", "there is no compiler for this"),
    ],
)
async def test_what_pip_refuses_is_told_and_permanent(
    workbench: Any, packages: Path, requirement: str, message: str
) -> None:
    runner = workbench.runners[0]
    before = complete(runner)
    attempt = workbench.attempt("true", environment=Environment(lines(packages, requirement)))
    with pytest.raises(StartFailed, match="its environment could not be built: ") as caught:
        await attempt.start()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.permanent
    assert complete(runner) == before
    assert "ERROR" in (environments_of(runner).directory / "failed.log").read_text().upper()


async def test_a_build_that_nobody_waits_for_any_more_is_killed_whole(workbench: Any, packages: Path) -> None:
    runner, began = workbench.runners[0], packages / "began"
    sdist(packages, "phx_hanging", "1.0", HANGING_BACKEND.format(began))
    environment = Environment(lines(packages, "phx-hanging==1.0"))
    pair = [workbench.attempt("true", environment=environment) for _ in range(2)]
    master = {"host": "127.0.0.1", "port": 0}
    calls = [asyncio.create_task(runner.prepare_group(await each.order(0, master))) for each in pair]
    await wait_for(lambda: began.exists() and began.read_text().endswith("\n"))
    pids = [int(pid) for pid in began.read_text().split()]
    assert {ref.attempt_id for ref in runner._present()} >= {each.id for each in pair}
    assert {oom_score(pid) for pid in pids} == {"1000\n"}, "not the runner first"
    await runner.kill_group(pair[0].id)
    with pytest.raises(StartFailed, match="stopped"):
        await calls[0]
    assert all(linux.stat_fields(pid) for pid in pids), "the other one waits for it"
    await runner.kill_group(pair[1].id)
    with pytest.raises(StartFailed, match="stopped"):
        await calls[1]
    assert not any(linux.stat_fields(pid) for pid in pids)
    key = environments_of(runner).key(Wanted(tuple(environment.requirements), None))
    assert not (environments_of(runner).directory / key).exists()
    assert not runner._preparing


@pytest.mark.skipif(not Cgroups.find().enforces("pids"), reason="no control groups here")
async def test_what_a_build_starts_is_bounded_and_cannot_flee_from_its_end(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("pip", path="/usr/bin") is None:
        pytest.skip("the system's Python has no pip")
    monkeypatch.setattr(cgroups, "MOST_PROCESSES", 1_000)
    began = tmp_path / "began"
    sdist(tmp_path, "phx_fleeing", "1.0", FLEEING_BACKEND.format(began))
    runner = await light_runner(server)
    environment = Environment(lines(tmp_path, "phx-fleeing==1.0"))
    attempt = make_workbench([runner], server, tmp_path).attempt("true", environment=environment)
    call = asyncio.create_task(runner.prepare_group(await attempt.order(0, {"host": "127.0.0.1", "port": 0})))
    await wait_for(began.exists)
    (cgroup,) = control_groups()
    assert (cgroup / "pids.max").read_text() == "1000\n"
    await runner.kill_group(attempt.id)
    with pytest.raises(StartFailed, match="stopped"):
        await call
    assert control_groups() == []
    assert not processes_of(environments_of(runner).directory)


def control_groups() -> list[Path]:
    return list(Cgroups.find().parents["pids"].glob("environment-*"))


def processes_of(directory: Path) -> list[str]:
    told = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            told.append(path.read_text())
    return [text for text in told if str(directory) in text]


async def test_tenants_own_users_build_and_use_but_never_change_it(
    light_runner: Any, server: Any, make_workbench: Any, world_readable: Path
) -> None:
    if shutil.which("pip", path="/usr/bin") is None:
        pytest.skip("the system's Python has no pip")
    runs = world_readable / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    code = f"import os; open({str(runs)!r} + '/' + str(os.getuid()), 'w').close()"
    wheel(world_readable, "phx_pth", "1.0", {"phx_pth.py": "", "phx_pth.pth": code, "phx_data.sh": "true"})
    runner = await light_runner(server, name=world_readable / "node", own_users=True, checkpoint_root=None)
    assert runner.capabilities()["own_users"], runner.capabilities()["own_users_problem"]
    bench = make_workbench([runner], server, world_readable)
    environment = Environment(lines(world_readable, "phx-pth==1.0"))
    script = world_readable / "train.py"
    script.write_text("import os, phx_pth; print(os.environ['VIRTUAL_ENV'])")
    attempt = bench.attempt(f"true && python {script}", uid=70123, environment=environment)
    assert (await attempt.run())[0]["exit_code"] == 0
    venv = server.text(attempt.id, rank=0).strip()
    assert {entry.name for entry in runs.iterdir()} == {"70123"}, "its code never runs as root"
    assert all(state.st_uid == 0 and not state.st_mode & 0o022 for state in states_below(Path(venv)))

    writes = bench.attempt(
        f"touch {venv}/x {venv}/bin/pip; rm -rf {venv}/lib; ls {venv}/lib", uid=70123, environment=environment
    )
    assert (await writes.run())[0]["exit_code"] == 0, "it reads it, though"
    assert not (Path(venv) / "x").exists()
    (log,) = environments_of(runner).directory.glob("*.log")
    other = bench.attempt(f"ls {venv} || ls {log.parent} || cat {log}", uid=70124)
    assert (await other.run())[0]["exit_code"] != 0, "not even what it is made of"
    assert len(complete(runner)) == 1
    mine = bench.attempt("true", uid=70124, environment=environment)
    await mine.run()
    assert len(complete(runner)) == 2, "tenants share none"


def oom_score(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text()


def states_below(directory: Path) -> list[os.stat_result]:
    found = [path.lstat() for path in directory.rglob("*")]
    return [state for state in found if not stat.S_ISLNK(state.st_mode)]


async def test_a_build_cannot_have_files_of_others_opened_to_its_tenant(world_readable: Path) -> None:
    """Where the kernel lets everybody link to everything, as it does by default."""
    place, secret = world_readable / "place", world_readable / "secret"
    place.mkdir()
    os.chown(place, 70123, 70123)
    secret.touch(mode=0o600)
    (place / "linked").hardlink_to(secret)
    with pytest.raises(StartFailed, match="link 'linked', which belongs to user 0") as refused:
        pip_build._seal(place, 70123)
    assert not refused.value.permanent, "where tenants have no users of their own it is no matter"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_gid) == (0o600, os.getegid())


async def test_nobody_comes_in_while_an_environment_is_sealed(
    world_readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, seen = world_readable / "place", []
    place.mkdir()
    (place / "file").touch()
    (place / "again").hardlink_to(place / "file")
    for path in (place, place / "file"):
        os.chown(path, 70123, 70123)
    seal_entry = pip_build._seal_entry

    def look(*given: Any) -> int:
        seen.append((place.stat().st_uid, place.stat().st_mode & 0o777))
        return seal_entry(*given)

    monkeypatch.setattr(pip_build, "_seal_entry", look)
    pip_build._seal(place, 70123)
    assert seen == [(0, 0o700), (0, 0o700)]
    assert (place.stat().st_uid, place.stat().st_gid, place.stat().st_mode & 0o777) == (0, 70123, 0o750)


async def test_a_package_from_the_index(workbench: Any) -> None:
    try:
        await asyncio.to_thread(lambda: socket.create_connection(("pypi.org", 443), timeout=3).close())
    except OSError as error:
        pytest.skip(f"PyPI cannot be reached: {error}")
    attempt = workbench.attempt(
        "python -c 'import einops; print(einops.__version__)'", environment=Environment(["einops==0.8.1"])
    )
    assert (await attempt.run())[0]["exit_code"] == 0
    assert workbench.server.text(attempt.id, rank=0) == "0.8.1\n"


# ------------------------------------------------------------------ what is kept


class FakeBuild:
    """Makes a directory of a given size at once, or fails as told."""

    def __init__(self, size_bytes: int = 1 << 20):
        self.size_bytes = size_bytes
        self.builds: list[tuple[str, ...]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = self.most_running = 0

    async def fingerprint(self) -> str:
        return "python"

    async def build(self, place: Path, log_path: Path, lines: list[str], *, uid: int | None, most_bytes: int) -> None:
        self.builds.append(tuple(lines))
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        packages = place / "venv" / "lib" / "python3.11" / "site-packages"
        packages.mkdir(parents=True)
        (packages / "module.py").write_bytes(b"x" * self.size_bytes)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1


def store(directory: Path, build: Any, *, limit_bytes: int = 3 << 20, used: Callable[[], Any] = tuple) -> Environments:
    return Environments(directory, build, limit_bytes, used)


async def use(environments: Environments, *lines: str) -> Built:
    async with environments.hold(Wanted(lines, None), lambda _: None) as built:
        return built


async def test_the_least_recently_used_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    used: set[str] = set()
    build = FakeBuild()
    environments = store(tmp_path, build, limit_bytes=(2 << 20) + 200_000, used=lambda: used)
    a, b = await use(environments, "a"), await use(environments, "b")
    os.utime(tmp_path / f"{a.key}.json", (1, 1))
    os.utime(tmp_path / f"{b.key}.json", (2, 2))
    used.add(a.key)
    c = await use(environments, "c")
    assert kept_in(tmp_path) == {a.key, c.key}
    async with environments.hold(Wanted(("c",), None), lambda _: None):
        os.utime(tmp_path / f"{c.key}.json", (3, 3))
        used.clear()
        await use(environments, "d")
        assert a.key not in kept_in(tmp_path)
        used.add(environments.key(Wanted(("d",), None)))
        await use(environments, "e")
        assert (tmp_path / c.key).exists(), "it is held"
    assert build.builds == [("a",), ("b",), ("c",), ("d",), ("e",)]
    await environments.close()


async def test_what_a_killed_runner_left_half_built_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = FakeBuild()
    environments = store(tmp_path, build)
    done = await use(environments, "done")
    half = tmp_path / environments.key(Wanted(("half",), None))
    (half / "venv").mkdir(parents=True)
    (tmp_path / f"{half.name}.log").touch()
    (tmp_path / "other.gone-1-0" / "venv").mkdir(parents=True)
    remove, removed_by = shutil.rmtree, []
    monkeypatch.setattr(
        environments_module.shutil,
        "rmtree",
        lambda *given, **more: (removed_by.append(threading.current_thread()), remove(*given, **more)),
    )
    again = store(tmp_path, build)
    assert not half.exists() and not (tmp_path / f"{half.name}.log").exists()
    assert await use(again, "done") == done
    assert build.builds == [("done",)]
    await again.close()
    assert names_in(tmp_path) == {done.key, f"{done.key}.json"}
    assert len(removed_by) == 2 and threading.main_thread() not in removed_by, "gigabytes would hold the runner up"


async def test_no_more_than_two_are_built_at_once(tmp_path: Path) -> None:
    build = FakeBuild()
    build.gate.clear()
    environments = store(tmp_path, build, limit_bytes=1 << 30)
    uses = [asyncio.create_task(use(environments, str(number))) for number in range(4)]
    await wait_for(lambda: build.running == 2)
    build.gate.set()
    await asyncio.gather(*uses)
    assert build.most_running == 2


async def test_a_tenant_whose_builds_hang_leaves_room_for_another(tmp_path: Path) -> None:
    build = FakeBuild()
    build.gate.clear()
    environments = store(tmp_path, build, limit_bytes=1 << 30)
    wanted = [Wanted((str(number),), uid) for number, uid in enumerate([70123, 70123, 70123, 70124])]

    async def hold(each: Wanted) -> None:
        async with environments.hold(each, lambda _: None):
            pass

    uses = [asyncio.create_task(hold(each)) for each in wanted]
    await wait_for(lambda: build.running == 2)
    assert build.builds == [("0",), ("3",)]
    build.gate.set()
    await asyncio.gather(*uses)
    assert sorted(build.builds) == [("0",), ("1",), ("2",), ("3",)]


async def test_a_build_that_was_given_up_at_once_can_be_had_again(tmp_path: Path) -> None:
    environments = store(tmp_path, FakeBuild())
    first = asyncio.create_task(use(environments, "a"))
    await asyncio.sleep(0)
    for _ in range(2):
        first.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(first, return_exceptions=True)
    assert (await asyncio.wait_for(use(environments, "a"), 5)).provides == {"module"}


# ------------------------------------------------------------------ warm processes


class FakeWarm:
    """A warm process that is there at once."""

    def __init__(self, **_: Any) -> None:
        self.closed = False

    def start(self, **_: Any) -> None:
        pass

    async def ready(self) -> WarmState:
        return WarmState(pid=1, python="3.11", torch="2", unfit="", loaded=frozenset({"torch", "numpy"}))

    async def close(self) -> None:
        self.closed = True


async def test_few_warm_processes_are_kept_the_most_recently_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreters_module, "WarmProcess", FakeWarm)
    base: Any = FakeWarm()
    environments = store(tmp_path, FakeBuild(1024), limit_bytes=1 << 30)
    interpreters = Interpreters(Interpreter(base, sys.executable, {"PATH": "/bin"}), environments, {"PATH": "/bin"})

    async def warm_of(name: str) -> Any:
        async with interpreters.hold(Environment([name]), None, lambda _: None) as interpreter:
            assert interpreter.node_env["PATH"].split(":")[0] == f"{interpreter.node_env['VIRTUAL_ENV']}/bin"
            return interpreter.warm

    kept = [await warm_of(str(number)) for number in range(MOST_WARM)]
    assert await warm_of("0") is kept[0]
    newest = await warm_of("new")
    await asyncio.gather(*interpreters._closing)
    assert [warm.closed for warm in (*kept, newest)] == [False, True, False, False, False]
    interpreters.close_idle(asyncio.get_running_loop().time() + IDLE_S + 60)
    await asyncio.gather(*interpreters._closing)
    assert not interpreters.warm_keys
    assert not base.closed
    async with interpreters.hold(None, None, lambda _: None) as interpreter:
        assert interpreter.warm is base


async def test_what_brings_its_own_of_what_is_loaded_starts_cold() -> None:
    warm: Any = FakeWarm()
    brings = Interpreter(warm, "python", {}, venv="/venv", brings=frozenset({"einops", "numpy"}))
    assert (await brings.ready()).unfit == "its environment brings its own numpy"
    harmless = Interpreter(warm, "python", {}, venv="/venv", brings=frozenset({"einops"}))
    assert (await harmless.ready()).unfit == ""


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("code", "output", "permanent", "said"),
    [
        (
            1,
            "ERROR: No matching distribution found for nosuch==1",
            True,
            "No matching distribution found for nosuch==1",
        ),
        (1, "Collecting async-timeout\nERROR: Cannot install a and b", True, "Cannot install a and b"),
        (
            1,
            "  × python setup.py did not run\n      RuntimeError: nope\n  note: x",
            True,
            "× python setup.py did not run; ",
        ),
        (1, "WARNING: Retrying (Retry(total=4)\nERROR: No matching distribution found for x", False, "No matching"),
        (1, "ERROR: Could not install: [Errno 28] No space left on device", False, "No space left"),
        (1, "/usr/bin/python3: No module named pip", False, "No module named pip"),
        (1, "  × Building wheel did not run\n  │ exit code: -9", False, "× Building wheel did not run"),
        (1, "ERROR: Could not install: [Errno 5] Input/output error: '/x'", False, "Input/output error"),
        (1, "ERROR: Could not install: [Errno 30] Read-only file system", False, "Read-only"),
        (1, "OSError: [Errno 24] Too many open files", False, "Too many open files"),
        (1, "BlockingIOError: [Errno 11] Resource temporarily unavailable", False, "temporarily unavailable"),
        (1, "ERROR: \x1b]0;title\x07no such package", True, "ERROR: ?]0;title?no such package"),
        (70, "PermissionError: [Errno 13]", False, "PermissionError"),
        (137, "Building wheel", False, "signal 9"),
        (1, "ERROR: HTTP error 404 while getting https://me:pw@host/x.whl", True, "getting https://host/x.whl"),
    ],
)
async def test_what_the_end_of_pip_means(code: int, output: str, permanent: bool, said: str) -> None:
    error = failure(code, output)
    assert error.permanent is permanent
    assert said in str(error)


async def test_an_environment_too_large_for_this_node_may_fit_on_another(tmp_path: Path) -> None:
    (tmp_path / "library").write_bytes(b"x" * (3 << 20))
    with pytest.raises(StartFailed, match="takes more than 2 MiB") as refused:
        await pip_build._expect_size(tmp_path, tmp_path / "log", 2 << 20)
    assert not refused.value.permanent, "its bound is this agent's setting"


async def test_packages_are_named_in_few_words() -> None:
    assert describe(["--pre", "a==1", "b", "c"]) == "3 packages: a==1, …"
    assert describe(["a @ https://host/a.whl"]) == "1 package: a"
    assert describe(["--pre"]) == "no packages"


async def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is looked at has no event
            await asyncio.sleep(0.01)


@pytest.fixture
def world_readable() -> Any:
    """A directory that other users may enter (pytest's own is private)."""
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    path = Path(tempfile.mkdtemp(prefix="phx-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
