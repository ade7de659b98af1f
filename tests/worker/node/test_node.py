"""Code bundles, own users and the fence, on runners of their own."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from phalanx_worker.node import fence as fence_module
from phalanx_worker.node import users
from phalanx_worker.node.fence import Fence, OutageFence
from phalanx_worker.node.service import StartFailed
from phalanx_worker.runtime import lease as lease_module
from phalanx_worker.runtime import linux
from phalanx_worker.runtime.lease import Lease

pytestmark = pytest.mark.asyncio(loop_scope="session")

USER_TREE = {
    "train.py": "import queue, server, worker\nfrom server import app\n"
    "import torch, concurrent.futures\nprint(queue.MINE, app.NAME, worker.NAME, open('data.txt').read())",
    "queue.py": "MINE = 'own queue'",
    "worker.py": "NAME = 'own worker'",
    "server/__init__.py": "",
    "server/app.py": "NAME = 'own server'",
    "data.txt": "data",
}


def bundle_of(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def publish(server: Any, files: dict[str, str]) -> str:
    data = bundle_of(files)
    sha256 = hashlib.sha256(data).hexdigest()
    server.bundles[sha256] = data
    return sha256


@pytest.mark.parametrize("command", ["python train.py", "python -m train"])
async def test_users_own_modules_win_over_ours_and_the_librarys(workbench: Any, command: str) -> None:
    attempt = workbench.attempt(command, bundle=publish(workbench.server, USER_TREE), ranks=2)
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [0, 0], exits
    assert all(start["warm"] for start in attempt.starts)
    assert workbench.server.text(attempt.id, rank=1) == "own queue own server own worker data\n"


async def test_bundle_is_fetched_once_and_each_attempt_has_its_own_files(workbench: Any) -> None:
    sha256 = publish(workbench.server, {"note.txt": "once"})
    first = workbench.attempt("echo spoilt > note.txt; touch more", bundle=sha256)
    await first.run()
    del workbench.server.bundles[sha256]
    second = workbench.attempt("cat note.txt && ls", bundle=sha256)
    await second.run()
    assert workbench.server.text(second.id, rank=0) == "oncenote.txt\n"


@pytest.mark.parametrize(
    ("files", "served", "message"),
    [
        ({"a": "b"}, None, "HTTP 404"),
        ({"a": "b"}, b"something else", "arrived damaged"),
        ({"../outside": "b"}, "as it is", "cannot be unpacked"),
    ],
    ids=["missing", "damaged", "reaches outside"],
)
async def test_bad_bundle_fails_the_start(workbench: Any, files: dict[str, str], served: Any, message: str) -> None:
    sha256 = publish(workbench.server, files)
    if served != "as it is":
        workbench.server.bundles.pop(sha256)
    if isinstance(served, bytes):
        workbench.server.bundles[sha256] = served
    with pytest.raises(StartFailed, match=message):
        await workbench.attempt("true", bundle=sha256).start()


async def test_ranks_run_as_their_tenants_user(
    light_runner: Any, server: Any, make_workbench: Any, world_readable: Path
) -> None:
    runner = await light_runner(server, name=world_readable / "node", own_users=True, checkpoint_root=None)
    assert runner.capabilities()["own_users"], runner.capabilities()["own_users_problem"]
    sha256 = publish(server, {"sub/code.py": "import os; print(os.getuid(), os.environ['USER'])"})
    command = (
        "id -u; id -G; stat -c %u . sub/code.py; touch mine $HOME/x $TMPDIR/x $PHALANX_CHECKPOINT_DIR/x; "
        "echo again > /dev/stdout; grep NoNewPrivs /proc/self/status; /usr/bin/python3 sub/code.py"
    )
    attempt = make_workbench([runner], server, world_readable).attempt(command, bundle=sha256, uid=70123)
    assert (await attempt.run())[0]["exit_code"] == 0
    assert server.text(attempt.id, rank=0, stream="stderr") == ""
    lines = server.text(attempt.id, rank=0).split()
    assert lines == ["70123", "70123", "70123", "70123", "again", "NoNewPrivs:", "1", "70123", "phx70123"]


async def test_a_checkpoint_path_is_made_with_the_rights_of_the_jobs_user(
    light_runner: Any, server: Any, make_workbench: Any, world_readable: Path
) -> None:
    runner = await light_runner(server, name=world_readable / "node", own_users=True, checkpoint_root=None)
    bench = make_workbench([runner], server, world_readable)
    with pytest.raises(StartFailed, match=r"may not make checkpoint\.url"):
        await bench.attempt("true", uid=70123, checkpoint_url=str(world_readable / "not" / "its")).start()
    assert not (world_readable / "not").exists()
    assert not list((world_readable / "node" / "attempts").iterdir())
    (world_readable / "its").mkdir(mode=0o777)
    (world_readable / "its").chmod(0o777)
    attempt = bench.attempt("stat -c %u $PHALANX_CHECKPOINT_DIR", uid=70123, checkpoint_url=f"{world_readable}/its/own")
    assert (await attempt.run())[0]["exit_code"] == 0
    assert server.text(attempt.id, rank=0) == "70123\n"


async def test_tenants_do_not_see_each_others_checkpoints(
    light_runner: Any, server: Any, make_workbench: Any, world_readable: Path
) -> None:
    runner = await light_runner(server, name=world_readable / "node", own_users=True, checkpoint_root=None)
    bench = make_workbench([runner], server, world_readable)
    writer = bench.attempt("echo secret > $PHALANX_CHECKPOINT_DIR/x; echo $PHALANX_CHECKPOINT_DIR/x", uid=70123)
    assert (await writer.run())[0]["exit_code"] == 0
    reader = bench.attempt(f"cat {server.text(writer.id, rank=0).strip()}", uid=70124)
    assert (await reader.run())[0]["exit_code"] != 0
    assert "secret" not in server.text(reader.id, rank=0)


@pytest.fixture
def world_readable() -> Any:
    """A directory that other users may enter (pytest's own is private)."""
    import shutil
    import tempfile

    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    path = Path(tempfile.mkdtemp(prefix="phx-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_own_users_that_cannot_work_are_not_pretended(light_runner: Any, server: Any, tmp_path: Path) -> None:
    runner = await light_runner(server, own_users=True)  # pytest's directories are private to this user
    capabilities = runner.capabilities()
    assert capabilities["own_users"] is False
    assert "so ranks run as" in capabilities["own_users_problem"]


async def test_cut_off_node_ends_its_ranks(light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path) -> None:
    async def gcs_is_gone() -> bool:
        await asyncio.Event().wait()
        return True

    runner = await light_runner(server, fence_s=0.4, gcs_alive=gcs_is_gone)
    attempt = await make_workbench([runner], server, tmp_path).attempt("sleep 60").start()
    await server.until(lambda: bool(server.marks(attempt.id, "note")))
    assert "cut off" in server.marks(attempt.id, "note")[0]["data"]["message"]
    assert (await attempt.exits())[0]["signal"] == signal.SIGKILL


async def test_a_node_without_its_server_for_long_ends_its_ranks(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    async def gcs_answers() -> bool:
        return True

    runner = await light_runner(server, outage_tolerance_s=1.0, heartbeat_s=0.1, gcs_alive=gcs_answers)
    attempt = await make_workbench([runner], server, tmp_path).attempt("echo up; sleep 60").start()
    await attempt.printed("up")
    await server.stop()
    assert (await attempt.exits())[0]["signal"] == signal.SIGKILL
    await server.start()
    await server.until(lambda: bool(server.marks(attempt.id, "note")))
    assert "cut off from the server for" in server.marks(attempt.id, "note")[0]["data"]["message"]


async def test_ranks_of_a_runner_that_hangs_end_by_themselves(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    async def gcs_answers() -> bool:
        return True

    runner = await light_runner(server, fence_s=1.0, gcs_alive=gcs_answers)
    attempt = await make_workbench([runner], server, tmp_path).attempt("sleep 60").start()
    await asyncio.sleep(0.2)
    time.sleep(0.4)  # noqa: ASYNC251 - the runner, which lives in this very loop, is stopped for less than the lease
    assert linux.stat_fields(attempt.starts[0]["pid"]) is not None
    await asyncio.sleep(0.2)
    time.sleep(2.0)  # noqa: ASYNC251 - and now for more
    assert linux.stat_fields(attempt.starts[0]["pid"]) is None
    assert (await attempt.exits())[0]["signal"] == signal.SIGKILL
    assert (await attempt.group())["first_failed_rank"] is None
    assert "the runner hung for 1 s" in server.marks(attempt.id, "note")[0]["data"]["message"]


async def test_a_guardian_that_was_stopped_itself_gives_its_runner_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    lease = Lease(60.0)
    now_s = 500.0
    assert not lease.is_over(now_s)
    assert lease.look_at <= 507.5
    assert not lease.is_over(507.0)
    assert lease.is_over(507.5)
    lease.renew(60.0)
    assert not lease.is_over(508.0)


async def test_an_outage_is_not_believed_by_a_runner_that_has_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(fence_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    outage = OutageFence(tolerance_s=3_600.0)
    outage.in_vain(10.0)
    now_s = 5_000.0  # it was stopped meanwhile
    assert not outage.is_over
    outage.in_vain(4_999.0)
    assert outage.is_over and outage.silent_s == 5_000.0
    outage.answered(4_999.5)
    assert not outage.is_over


async def test_fence_holds_while_gcs_answers_though_the_agent_is_silent() -> None:
    asked = asyncio.Event()
    cut_off: list[float] = []

    async def gcs_alive() -> bool:
        asked.set()
        return True

    fence = Fence(fence_s=0.2, gcs_alive=gcs_alive)
    run = asyncio.create_task(fence.run(cut_off.append))
    for _ in range(3):
        asked.clear()
        await asyncio.wait_for(asked.wait(), 5)
    run.cancel()
    assert cut_off == []


async def test_fence_cuts_off_at_the_end_of_the_lease_though_gcs_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test: an interval too late is an interval in which two attempts may run."""
    now_s, cut_off = 0.0, []

    async def sleep(duration_s: float) -> None:
        nonlocal now_s
        now_s += duration_s
        if now_s > 70:
            raise asyncio.CancelledError

    async def wait_for(question: Any, timeout_s: float) -> None:
        question.close()
        await sleep(timeout_s)
        raise TimeoutError

    async def gcs_hangs() -> bool:
        return True

    monkeypatch.setattr(fence_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(fence_module, "asyncio", SimpleNamespace(sleep=sleep, wait_for=wait_for))
    with pytest.raises(asyncio.CancelledError):
        await Fence(fence_s=60.0, gcs_alive=gcs_hangs).run(cut_off.append)
    assert cut_off[0] == pytest.approx(60.0)


async def test_settings_that_fail_leave_no_warm_process_behind(
    light_runner: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> str:
        raise OSError("no more processes")

    monkeypatch.setattr(users, "own_users_problem", broken)
    before = _children()
    with pytest.raises(OSError, match="no more"):
        await light_runner(server, own_users=True)
    await asyncio.sleep(0)  # a process would be started by a task of its own
    assert _children() == before


def _children() -> set[int]:
    return {pid for pid, parent in linux.parents().items() if parent == os.getpid()}
