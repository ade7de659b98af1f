"""Groups of real processes on one or two runners, from order to exits."""

# ruff: noqa: ASYNC240 - a test may look into /proc and its own small files
from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import bundles
from phalanx_worker.node.ranks import Group
from phalanx_worker.node.service import StartFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")

DDP_SCRIPT = """
    import os, sys
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def main():
        dist.init_process_group("gloo")
        model = DistributedDataParallel(torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            x = torch.randn(16, 8)
            loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        print("sum of ranks", int(total), "local", os.environ["LOCAL_RANK"], "threads", torch.get_num_threads())
        dist.destroy_process_group()

    if __name__ == "__main__":
        main()
"""


async def test_unmodified_torchrun_script_runs_on_two_nodes_warm(workbench: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script(DDP_SCRIPT)} --lr 0.1", nodes=2, ranks=2)
    exits = await attempt.run()
    assert [(end["rank"], end["exit_code"]) for end in exits] == [(rank, 0) for rank in range(4)], exits
    assert all(start["warm"] and not start["cold_reason"] for start in attempt.starts)
    for rank in range(4):
        assert workbench.server.text(attempt.id, rank=rank) == f"sum of ranks 6 local {rank % 2} threads 1\n"
    for kind in ("rendezvous", "first_step"):
        assert sorted(mark["rank"] for mark in workbench.server.marks(attempt.id, kind)) == [0, 1, 2, 3]


async def test_unmodified_torchrun_script_runs_cold_and_says_why(workbench: Any) -> None:
    script = workbench.script(DDP_SCRIPT)
    attempt = workbench.attempt(f"python {script}", ranks=2, env={"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "2"})
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [0, 0], [end["tail"] for end in exits]
    assert {start["cold_reason"] for start in attempt.starts} == {
        "PYTHONHASHSEED is set, which matters when Python starts"
    }
    assert workbench.server.text(attempt.id, rank=1) == "sum of ranks 1 local 1 threads 2\n"
    for kind in ("rendezvous", "first_step"):
        assert sorted(mark["rank"] for mark in workbench.server.marks(attempt.id, kind)) == [0, 1]


async def test_environment_is_torchruns_and_phalanxs_and_no_more(workbench: Any) -> None:
    script = workbench.script("import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))")
    attempt = workbench.attempt(f"python {script}", nodes=2, ranks=2, env={"MY_FLAG": "1", "RANK": "77"})
    await attempt.run()
    env, cwd = json.loads(workbench.server.text(attempt.id, rank=3))
    expected = {
        "RANK": "3",
        "ROLE_RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "4",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": attempt.id,
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "MY_FLAG": "1",
        "PHALANX_JOB_ID": attempt.desired.job_id,
        "PHALANX_ATTEMPT": "1",
        "PHALANX_TENANT": "research/nlp",
        "PHALANX_RESUME_FROM": "",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert {"MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE", "HOME", "USER", "TMPDIR"} <= set(env)
    assert Path(env["PHALANX_CHECKPOINT_DIR"]).is_dir() and Path(env["PHALANX_OUTPUT_DIR"]).is_dir()
    assert "s3cret" not in env.values() and not any(name.startswith(("RAY_", "AWS_")) for name in env)
    assert cwd != env["HOME"] != env["TMPDIR"]


async def test_a_rank_alone_on_its_node_has_the_threads_of_its_cores_as_under_torchrun(workbench: Any) -> None:
    script = workbench.script("import os, torch; print(os.environ.get('OMP_NUM_THREADS'), torch.get_num_threads())")
    attempt = workbench.attempt(f"python {script}", cpus=3.5)
    await attempt.run()
    assert attempt.starts[0]["warm"] and workbench.server.text(attempt.id, rank=0) == "None 3\n"


async def test_every_way_to_end_is_told_apart(workbench: Any) -> None:
    script = workbench.script("""
        import os, signal, sys
        rank = int(os.environ["RANK"])
        if rank == 0: pass
        elif rank == 1: sys.exit(3)
        elif rank == 2: sys.exit("a reason")
        elif rank == 3: raise ValueError("broken")
        elif rank == 4: os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 5: raise KeyboardInterrupt
    """)
    exits = await workbench.attempt(f"python {script}", ranks=6).run()
    ends = [(end["exit_code"], end["signal"]) for end in exits]
    assert ends == [(0, None), (3, None), (1, None), (1, None), (None, signal.SIGKILL), (None, signal.SIGINT)]
    assert exits[2]["tail"] == "a reason\n"
    lines = exits[3]["tail"].splitlines()
    assert lines[0] == "Traceback (most recent call last):" and "train.py" in lines[1]
    assert lines[-1] == "ValueError: broken"


async def test_first_failure_is_told_at_once_while_others_run(workbench: Any) -> None:
    script = workbench.script("""
        import os, sys, time
        sys.exit(7) if os.environ["RANK"] == "1" else time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}", ranks=2).start()
    group = await attempt.group(state="failing")
    assert group["first_failed_rank"] == 1
    assert [end["rank"] for end in group["exits"]] == [1]
    await attempt.runners[0].stop_group(attempt.id, 5.0)
    exits = await attempt.exits()
    assert exits[0]["signal"] == signal.SIGTERM


async def test_starting_again_answers_the_same_ranks(workbench: Any) -> None:
    attempt = await workbench.attempt("sleep 30").start()
    again = await attempt.runners[0].start_group(await attempt.order(0, {"host": "127.0.0.1", "port": 1}))
    assert again["ranks"] == attempt.starts
    await attempt.runners[0].kill_group(attempt.id)
    assert (await attempt.exits())[0]["signal"] == signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "message"), [("", "empty"), ("python 'a", "No closing quotation")], ids=["empty", "open quote"]
)
async def test_command_that_cannot_be_understood_fails_the_start(workbench: Any, command: str, message: str) -> None:
    attempt = workbench.attempt(command)
    with pytest.raises(StartFailed, match=message):
        await attempt.start()
    assert not [path for path in _attempt_directories(workbench) if attempt.id in path.name]


def _attempt_directories(workbench: Any) -> list[Path]:
    root = Path(workbench.runners[0]._settings.data_dir)
    return list((root / "attempts").iterdir())


async def test_command_that_does_not_exist_exits_127(workbench: Any) -> None:
    exits = await workbench.attempt("no-such-program --flag").run()
    assert exits[0]["exit_code"] == 127
    assert exits[0]["tail"] == "phalanx: no-such-program: command not found\n"


async def test_script_that_does_not_exist_ends_as_python_would(workbench: Any) -> None:
    exits = await workbench.attempt("python nothing.py").run()
    assert exits[0]["exit_code"] == 2
    assert "can't open file" in exits[0]["tail"]


async def test_shell_command_runs_in_a_shell(workbench: Any) -> None:
    attempt = workbench.attempt('echo "rank $RANK of $WORLD_SIZE" | tr a-z A-Z && exit 4', ranks=2)
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [4, 4]
    assert workbench.server.text(attempt.id, rank=1) == "RANK 1 OF 2\n"


async def test_sigterm_gives_the_grace_to_save(workbench: Any) -> None:
    script = workbench.script("""
        import signal, sys, time
        def save(*_):
            time.sleep(0.3); print("saved", flush=True); sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}").start()
    await attempt.printed("ready")
    await attempt.runners[0].stop_group(attempt.id, 10.0)
    assert (await attempt.exits())[0]["exit_code"] == 0
    assert "saved" in workbench.server.text(attempt.id, rank=0)


async def test_what_ignores_sigterm_is_killed_after_the_grace(workbench: Any) -> None:
    script = workbench.script("""
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"python {script}").start()
    await attempt.printed("ready")
    await attempt.runners[0].stop_group(attempt.id, 0.3)
    assert (await attempt.exits())[0]["signal"] == signal.SIGKILL


async def test_grace_reaches_a_program_behind_a_shell(workbench: Any) -> None:
    script = workbench.script("""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(0)))
        print("ready", flush=True)
        time.sleep(60)
    """)
    attempt = await workbench.attempt(f"cd /; python {script}; true").start()
    await attempt.printed("ready")
    await attempt.runners[0].stop_group(attempt.id, 10.0)
    await attempt.exits()
    assert "saved" in workbench.server.text(attempt.id, rank=0)


async def test_should_stop_finished_and_checkpoint(workbench: Any) -> None:
    script = workbench.script("""
        import time, phalanx
        step = 0
        while not phalanx.should_stop():
            step += 1
            phalanx.report(step=step, total_steps=1000, loss=float("nan"), lr=0.5)
            print("stepping", flush=True)
            time.sleep(0.02)
        phalanx.checkpoint("step-9", step=9, tokens=12)
        phalanx.finished()
    """)
    attempt = await workbench.attempt(f"python {script}").start()
    await attempt.printed("stepping")
    await attempt.runners[0].stop_group(attempt.id, 10.0)
    end = (await attempt.exits())[0]
    assert (end["exit_code"], end["finished"]) == (0, True)
    server = workbench.server
    checkpoint = server.marks(attempt.id, "checkpoint")[0]["data"]
    assert checkpoint["url"].endswith(f"{attempt.desired.job_id}/step-9")
    assert (checkpoint["step"], checkpoint["tokens"]) == (9, 12)
    assert [mark["data"] for mark in server.marks(attempt.id, "progress")] == [{"total_steps": 1000}]
    assert server.items("metrics", attempt.id)[0]["values"] == {"loss": "nan", "lr": 0.5}


async def test_memory_over_the_limit_ends_the_group_as_oom(workbench: Any) -> None:
    script = workbench.script("""
        import os, time
        block = bytearray(os.urandom(1 << 20)) * (400 if os.environ["RANK"] == "1" else 1)
        time.sleep(60)
    """)
    attempt = workbench.attempt(f"python {script}", ranks=2, memory_bytes=300 << 20)
    exits = await attempt.run()
    assert [(end["signal"], end["oom"]) for end in exits] == [(signal.SIGKILL, True)] * 2
    reason = "ran out of memory: the limit is 300 MiB for the 2 ranks on this node"
    assert [end["reason"] for end in exits] == [f"was ended because rank 1 {reason}", reason]
    assert (await attempt.group())["first_failed_rank"] == 1
    (mark,) = workbench.server.marks(attempt.id, "oom")
    assert mark["data"]["used_bytes"] >= mark["data"]["limit_bytes"] == 300 << 20
    assert (mark["rank"], mark["data"]["message"]) == (1, f"rank 1 {reason}: the ranks on this node were ended")


async def test_daemons_left_behind_are_killed_before_the_group_ends(workbench: Any) -> None:
    script = workbench.script("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print(os.getpid(), flush=True)
                time.sleep(60)
            os._exit(0)
        os.wait()
        time.sleep(0.2)
    """)
    attempt = workbench.attempt(f"python {script}")
    assert (await attempt.run())[0]["exit_code"] == 0
    daemon = int(workbench.server.text(attempt.id, rank=0))
    assert not Path(f"/proc/{daemon}").exists()


async def test_death_of_the_guardian_leaves_nothing(workbench: Any) -> None:
    attempt = await workbench.attempt("sh -c 'setsid sleep 77.5 & sleep 60'", ranks=2).start()
    guardian = int(Path(f"/proc/{attempt.starts[0]['pid']}/stat").read_text().split()[3])
    os.kill(guardian, signal.SIGKILL)
    exits = await attempt.exits()
    assert [(end["exit_code"], end["signal"]) for end in exits] == [(None, None)] * 2
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"77.5" in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_a_rank_that_hangs_after_others_are_done_is_ended_as_a_straggler(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    command = "[ $RANK = 0 ] || sleep 60"
    env = {"PHALANX_STRAGGLER_S": "1"}
    attempt = make_workbench([runner], server, tmp_path).attempt(command, ranks=2, env=env)
    done, straggler = await attempt.run()
    assert (done["exit_code"], done["tail"]) == (0, "")
    assert (straggler["signal"], straggler["tail"]) == (signal.SIGTERM, "phalanx: ended as a straggler\n")
    assert "rank 1 was ended as a straggler" in server.marks(attempt.id, "note")[0]["data"]["message"]


async def test_a_straggler_that_ignores_sigterm_is_killed_with_what_it_started(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    command = "trap '' TERM; [ $RANK = 0 ] || sleep 60"
    env = {"PHALANX_STRAGGLER_S": "0.5"}
    exits = await make_workbench([runner], server, tmp_path).attempt(command, ranks=2, env=env).run()
    assert [(end["exit_code"], end["signal"]) for end in exits] == [(0, None), (None, signal.SIGKILL)]


async def test_a_rank_that_works_on_after_others_are_done_is_no_straggler(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    command = "[ $RANK = 0 ] || timeout 3 sh -c 'while :; do :; done' || echo saved"
    env = {"PHALANX_STRAGGLER_S": "0.5"}
    attempt = make_workbench([runner], server, tmp_path).attempt(command, ranks=2, env=env)
    assert [end["exit_code"] for end in await attempt.run()] == [0, 0]
    assert server.text(attempt.id, rank=1) == "saved\n"


async def test_a_group_whose_watching_fails_ends_all_the_same(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("of another version")

    attempt = await workbench.attempt("[ $RANK = 0 ] || sleep 60.7", ranks=2).start()
    monkeypatch.setattr(Group, "_take_exit", broken)
    exits = await attempt.exits()
    assert [(end["exit_code"], end["signal"]) for end in exits] == [(None, None)] * 2
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"60.7" in _read(path)]


async def test_death_of_the_warm_process_ends_no_group(workbench: Any) -> None:
    runner = workbench.runners[1]
    workbench.runners = [runner]
    attempt = await workbench.attempt("sleep 30").start()
    before = runner._duties.warm.state.pid
    os.kill(before, signal.SIGKILL)
    seq = -1
    while (facts := await runner.next_facts(seq, 30))["warm_ready"] is False or runner._duties.warm.state.pid == before:
        seq = facts["seq"]
    await runner.stop_group(attempt.id, 5.0)
    assert (await attempt.exits())[0]["signal"] == signal.SIGTERM
    after = workbench.attempt(f"python {workbench.script('print(1)')}")
    assert (await after.run())[0]["exit_code"] == 0


async def test_store_outlives_the_ranks_that_ended_first(workbench: Any) -> None:
    script = workbench.script("""
        import os, time, torch.distributed as dist
        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            time.sleep(1)
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store.set("late", "1")
            print(store.get("late"))
    """)
    attempt = workbench.attempt(f"python {script}", nodes=2)
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [0, 0], [end["tail"] for end in exits]
    assert workbench.server.text(attempt.id, rank=1) == "b'1'\n"


async def test_stop_during_a_start_gives_it_up(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = workbench.runners[0]
    entered = asyncio.Event()

    async def hang(*_: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(runner._duties.launcher.bundles, "unpack", hang)
    attempt = workbench.attempt("true", bundle="0" * 64)
    start = asyncio.create_task(attempt.start())
    await entered.wait()
    await runner.kill_group(attempt.id)
    with pytest.raises(StartFailed, match="stopped"):
        await start


async def test_a_start_that_is_given_up_leaves_no_files_though_its_thread_still_writes(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, loop, entered = workbench.runners[0], asyncio.get_running_loop(), asyncio.Event()

    def write_on(archive: Path, target: Path, uid: int | None, given_up: threading.Event) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert given_up.wait(10)
        for number in range(50):
            (target / f"late-{number}").mkdir(parents=True)
            time.sleep(0.005)

    monkeypatch.setattr(bundles, "_extract", write_on)
    sha256 = "0" * 64
    (Path(runner._settings.data_dir) / "bundles" / f"{sha256}.tar").touch()
    attempt = workbench.attempt("true", bundle=sha256)
    start = asyncio.create_task(attempt.start())
    await entered.wait()
    await runner.kill_group(attempt.id)
    with pytest.raises(StartFailed, match="stopped"):
        await start
    assert not [path for path in _attempt_directories(workbench) if attempt.id in path.name]


async def test_a_start_under_way_is_in_the_heartbeat_and_ends_where_the_node_is_cut_off(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gcs_is_gone() -> bool:
        return False

    runner = await light_runner(server, heartbeat_s=0.1, fence_s=0.5, gcs_alive=gcs_is_gone)
    goes_on = asyncio.Event()

    async def hang(*_: Any) -> None:
        await goes_on.wait()

    monkeypatch.setattr(runner._duties.launcher.bundles, "unpack", hang)
    attempt = make_workbench([runner], server, tmp_path).attempt("true", bundle="0" * 64)
    start = asyncio.create_task(attempt.start())
    wanted = [{"attempt_id": attempt.id, "epoch": attempt.desired.epoch}]
    await server.until(lambda: bool(server.reports) and server.reports[-1]["heartbeat"]["attempts"] == wanted)
    await asyncio.sleep(runner._duties.fence.fence_s - runner._duties.fence.silent_s)
    assert runner._duties.fence.is_over
    goes_on.set()
    with pytest.raises(StartFailed, match="cut off"):
        await start


def has_torch(pid: int) -> bool:
    """Whether the process has torch in its memory."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


async def test_a_program_that_needs_no_torch_is_not_forked_from_it(workbench: Any) -> None:
    lone = await workbench.attempt("sleep 60").start()
    gang = await workbench.attempt("sleep 60", nodes=2).start()
    warm = await workbench.attempt(f"python {workbench.script('import time; time.sleep(60)')}").start()
    groups = [group for runner in workbench.runners for group in runner._groups() if group.state == "running"]
    guardians = {(group.order.attempt_id, group.order.group.group_rank): group.guardian_pid for group in groups}
    assert not has_torch(guardians[lone.id, 0])
    assert has_torch(guardians[gang.id, 0]), "it hosts the store of the gang"
    assert not has_torch(guardians[gang.id, 1])
    assert has_torch(guardians[warm.id, 0])


async def test_a_lone_rank_that_starts_cold_meets_itself(workbench: Any) -> None:
    script = workbench.script("""
        import os, torch.distributed as dist
        dist.init_process_group("gloo")
        print(dist.get_world_size(), os.environ["TORCHELASTIC_USE_AGENT_STORE"])
    """)
    attempt = workbench.attempt(f"python -X faulthandler {script}")
    assert [end["exit_code"] for end in await attempt.run()] == [0]
    assert workbench.server.text(attempt.id, rank=0) == "1 False\n"
