"""What the operator lets jobs mount, and what ranks then see, on real runners."""

# ruff: noqa: ASYNC221, ASYNC240 - a test may mount, and look at its own small files
from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node import isolation as isolation_module
from phalanx_worker.node import mounts, users
from phalanx_worker.node.isolation import private_mounts_problem
from phalanx_worker.node.mounts import Allowed
from phalanx_worker.node.orders import StartFailed
from phalanx_worker.protocol import Mount
from phalanx_worker.runtime.spec import MountSpec

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHM_BYTES = 64 << 20


@pytest.fixture
def datasets() -> Iterator[Path]:
    """Not below pytest's directory, which no other user can enter."""
    path = Path(tempfile.mkdtemp(prefix="phx-datasets-"))
    path.chmod(0o755)
    (path / "mnist").mkdir()
    (path / "mnist" / "train.bin").write_text("digits")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def target() -> Iterator[Path]:
    path = Path(f"/phx-test-{secrets.token_hex(4)}")
    yield path
    if path.exists():
        path.rmdir()


@pytest.fixture
def private(light_python: tuple[str, dict[str, str]]) -> None:
    problem = private_mounts_problem(light_python[0], {**os.environ, **light_python[1]})
    if problem:
        pytest.skip(f"no mounts of their own here: {problem}")


@pytest.fixture
def not_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation_module, "private_mounts_problem", lambda *_: "Operation not permitted")


# ------------------------------------------------------------------ the rule


def planned(
    mount: Mount, *allowed: str, private: bool = True, writable: bool = False, uid: int | None = None
) -> list[MountSpec]:
    rules = [Allowed.read(text) for text in allowed]
    return mounts.plan(
        [mount],
        rules,
        private=private,
        may_write=lambda _: writable,
        may_enter=lambda path, below: users.may_enter(path, uid, below=below),
    )


async def test_what_lies_below_an_allowed_directory_may_be_mounted(datasets: Path) -> None:
    source = str(datasets / "mnist")
    assert planned(Mount(source, "/data"), str(datasets)) == [MountSpec(source, "/data", True)]
    assert planned(Mount(source, "/data", read_only=False), f"{datasets}:ro", source) == [
        MountSpec(source, "/data", False)
    ]


async def test_the_nearest_rule_says_whether_one_may_write(datasets: Path) -> None:
    source = str(datasets / "mnist")
    with pytest.raises(StartFailed, match=r"allows .*/mnist \(read-only\), so it needs read_only"):
        planned(Mount(source, "/data", read_only=False), str(datasets), f"{source}:ro")
    with pytest.raises(StartFailed, match=rf"holds {source}, which the operator allows only to be read"):
        planned(Mount(str(datasets), "/data", read_only=False), str(datasets), f"{source}:ro")
    assert planned(Mount(str(datasets), "/data"), str(datasets), f"{source}:ro")


async def test_mounting_opens_no_directory_that_is_closed_to_the_ranks_user(datasets: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives ranks users of their own")
    home = datasets / "bob"
    (home / "work").mkdir(parents=True)
    home.chmod(0o700)
    source = str(home / "work")
    with pytest.raises(StartFailed, match=f"{source}: the job's user may not enter it") as refused:
        planned(Mount(source, "/data"), str(datasets), uid=70002)
    assert not refused.value.permanent, "it may on another node"
    assert planned(Mount(source, "/data"), source, uid=70002), "the operator has opened it by name"


async def test_a_link_leads_nowhere_else(datasets: Path) -> None:
    (datasets / "escape").symlink_to("/etc")
    with pytest.raises(StartFailed, match=rf"escape \(which is /etc\): the operator allows {datasets} to be mounted"):
        planned(Mount(str(datasets / "escape"), "/data"), str(datasets))


@pytest.mark.parametrize(
    ("mount", "allowed", "said"),
    [
        (Mount("/etc", "/data"), [], "/etc: the operator allows nothing to be mounted"),
        (Mount("{}2", "/data"), ["{}"], "the operator allows"),
        (Mount("{}/mnist", "/data", read_only=False), ["{}:ro"], r"allows .* \(read-only\), so it needs read_only"),
        (Mount("{}", "/data", read_only=False), ["{}", "{}/mnist:ro"], "mount what lies beside it"),
        (Mount("{}/absent", "/data"), ["{}"], "there is no such directory on this node"),
        (Mount("{}/mnist/train.bin", "/data"), ["{}"], "there is no such directory on this node"),
    ],
)
async def test_what_is_not_allowed_is_refused_by_name_and_for_this_node_only(
    datasets: Path, mount: Mount, allowed: list[str], said: str
) -> None:
    mount = Mount(mount.source.format(datasets), mount.target, mount.read_only)
    with pytest.raises(StartFailed, match=said) as refused:
        planned(mount, *(text.format(datasets) for text in allowed))
    assert not refused.value.permanent, "another node may have it, or another list"


async def test_without_mounting_only_what_is_already_so_is_had(datasets: Path) -> None:
    source = str(datasets / "mnist")
    assert planned(Mount(source, source), str(datasets), private=False) == []
    assert planned(Mount(source, source, read_only=False), str(datasets), private=False, writable=True) == []
    with pytest.raises(StartFailed, match="so the target must be"):
        planned(Mount(source, "/data"), str(datasets), private=False)
    with pytest.raises(StartFailed, match="cannot make it read-only"):
        planned(Mount(source, source), str(datasets), private=False, writable=True)


@pytest.mark.parametrize("text", ["datasets", "/srv:rx", ""])
async def test_a_mistake_in_what_is_allowed_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no directory to allow"):
        Allowed.read(text)


# ------------------------------------------------------------------ real ranks


async def test_ranks_see_a_mount_and_nobody_else_does(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path, target: Path
) -> None:
    runner = await light_runner(server, allow_mounts=[str(datasets)])
    command = (
        f"cat {target}/train.bin; sh -c 'echo more > {target}/new'; grep ' {target} ' /proc/self/mountinfo; sleep 1"
    )
    mount = Mount(f"{datasets}/mnist", str(target))
    attempt = await make_workbench([runner], server, tmp_path).attempt(command, mounts=[mount]).start()
    await attempt.printed("digits")
    assert list(target.iterdir()) == []
    await attempt.exits()
    assert "Read-only file system" in server.text(attempt.id, rank=0, stream="stderr")
    options = server.text(attempt.id, rank=0).split()
    assert {"ro", "nosuid", "nodev"} <= set(options[options.index(str(target)) + 1].split(","))


async def test_a_mount_to_write_is_written_through(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path, target: Path
) -> None:
    runner = await light_runner(server, allow_mounts=[str(datasets)])
    mount = Mount(str(datasets), str(target), read_only=False)
    attempt = make_workbench([runner], server, tmp_path).attempt(f"echo new > {target}/new", mounts=[mount])
    assert (await attempt.run())[0]["exit_code"] == 0
    assert (datasets / "new").read_text() == "new\n"


async def test_what_is_mounted_below_the_source_is_read_only_too(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path, target: Path
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(datasets / "mnist")], check=True)
    try:
        runner = await light_runner(server, allow_mounts=[str(datasets)])
        mount = Mount(str(datasets), str(target))
        command = f"echo new > {target}/mnist/new || echo refused"
        attempt = make_workbench([runner], server, tmp_path).attempt(command, mounts=[mount])
        await attempt.run()
        assert server.text(attempt.id, rank=0) == "refused\n"
    finally:
        subprocess.run(["umount", str(datasets / "mnist")], check=True)


async def test_a_target_in_use_fails_the_start_and_leaves_nothing(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path
) -> None:
    runner = await light_runner(server, allow_mounts=[str(datasets)])
    link = datasets / "link"
    link.symlink_to("/etc")
    for target, said in [(str(tmp_path), "exists on the node and is not empty"), (f"{link}/x", "'link' is a link")]:
        attempt = make_workbench([runner], server, tmp_path).attempt(
            "true", ranks=2, mounts=[Mount(f"{datasets}/mnist", target)]
        )
        with pytest.raises(StartFailed, match=said):
            await attempt.start()
        assert list(Path(runner._settings.data_dir, "attempts").iterdir()) == []
    assert not Path("/etc/x").exists()


async def test_a_missing_target_is_made_with_no_more_rights_than_the_job_has(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path, target: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives ranks users of their own")
    data = Path(tempfile.mkdtemp(prefix="phx-mounts-"))
    data.chmod(0o755)
    try:
        runner = await light_runner(server, name=str(data / "node"), own_users=True, allow_mounts=[str(datasets)])
        if not runner._duties.launcher.own_users:
            pytest.skip(runner._duties.own_users_problem)
        bench = make_workbench([runner], server, tmp_path)

        def mounted(path: Path) -> Any:
            return bench.attempt(f"cat {path}/train.bin", mounts=[Mount(f"{datasets}/mnist", str(path))])

        foreign = data / "foreign"
        foreign.mkdir()
        for path in (foreign / "new", target / "new"):
            with pytest.raises(StartFailed, match=f"{path} does not exist on the node, and the job's user may not"):
                await mounted(path).start()
        assert not (foreign / "new").exists() and not target.exists()
        own = data / "own"
        own.mkdir()
        os.chown(own, 70001, 70001)
        for path in (target, own / "new"):
            assert (await mounted(path).run())[0]["exit_code"] == 0
        assert (own / "new").stat().st_uid == 70001
    finally:
        shutil.rmtree(data)


async def test_what_the_node_mounts_later_is_seen_but_not_below_a_mount(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, datasets: Path, target: Path
) -> None:
    """As with autofs; below a mount that is only read it could be written."""
    subprocess.run(["mount", "--bind", str(datasets), str(datasets)], check=True)
    subprocess.run(["mount", "--make-shared", str(datasets)], check=True)
    try:
        runner = await light_runner(server, allow_mounts=[str(datasets)])
        command = f"echo up; until [ -e {tmp_path}/go ]; do sleep 0.02; done; ls {datasets}/mnist; ls {target}/mnist"
        mount = Mount(str(datasets), str(target))
        attempt = await make_workbench([runner], server, tmp_path).attempt(command, mounts=[mount]).start()
        await attempt.printed("up")
        subprocess.run(["mount", "-t", "tmpfs", "none", str(datasets / "mnist")], check=True)
        (datasets / "mnist" / "late").touch()
        (tmp_path / "go").touch()
        await attempt.exits()
        assert server.text(attempt.id, rank=0).split() == ["up", "late", "train.bin"]
    finally:
        subprocess.run(["umount", str(datasets / "mnist")], check=False)
        subprocess.run(["umount", str(datasets)], check=True)


async def test_shared_memory_is_empty_once_the_ranks_are_gone(workbench: Any) -> None:
    """The guardian lives on with the rendezvous store, for as long as other nodes may need that."""
    runner = workbench.runners[0]
    if runner._duties.launcher.isolation.private_problem:
        pytest.skip("no mounts of their own here")
    attempt = workbench.attempt("head -c 1M /dev/zero > /dev/shm/large", ranks=2)  # so the guardian hosts a store
    await attempt.run()
    (group,) = [each for each in runner._groups() if each.order.attempt_id == attempt.id]
    assert not Path(f"/proc/{group.guardian_pid}/root/dev/shm/large").exists()
    assert Path(f"/proc/{group.guardian_pid}/root/dev/shm").is_dir(), "the guardian is still there"


async def test_each_attempt_has_a_shared_memory_of_its_own(
    private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    wait = "until [ -e /dev/shm/mine ]; do sleep 0.02; done"
    command = f"[ $RANK = 1 ] || touch /dev/shm/mine; {wait}; ls /dev/shm; stat -f -c '%b %S' /dev/shm"
    attempt = make_workbench([runner], server, tmp_path).attempt(command, ranks=2, shm_bytes=SHM_BYTES)
    await attempt.run()
    name, blocks, size = server.text(attempt.id, rank=1).split()
    assert (name, int(blocks) * int(size)) == ("mine", SHM_BYTES)
    assert not Path("/dev/shm/mine").exists()


async def test_without_mounting_shared_memory_must_be_large_enough(
    not_private: None, light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    bench = make_workbench([runner], server, tmp_path)
    assert (await bench.attempt("true", shm_bytes=1 << 20).run())[0]["exit_code"] == 0
    with pytest.raises(StartFailed, match=r"run\.shm asks for 1073741824 MiB, and /dev/shm of this node has"):
        await bench.attempt("true", shm_bytes=1 << 50).start()


async def test_training_with_workers_runs_in_a_shared_memory_of_its_own(workbench: Any) -> None:
    script = workbench.script("""
        import torch, torch.distributed as dist
        from torch.utils.data import DataLoader, TensorDataset
        dist.init_process_group("gloo")
        data = TensorDataset(torch.arange(64, dtype=torch.float32).view(-1, 1))
        total = sum(batch.sum() for (batch,) in DataLoader(data, batch_size=8, num_workers=1))
        dist.all_reduce(total)
        print(total.item())
    """)
    attempt = workbench.attempt(f"python {script}", ranks=2, cpus=0, shm_bytes=SHM_BYTES, memory_bytes=2 << 30)
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [0, 0], exits
    assert workbench.server.text(attempt.id, rank=0) == "4032.0\n"
