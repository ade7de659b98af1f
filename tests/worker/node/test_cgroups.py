"""Finding one's control groups from what the kernel says, and v2 on a real hierarchy of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from phalanx_worker.node import cgroups, sizes
from phalanx_worker.node.cgroups import Cgroup, Cgroups, Limits, own_cgroups
from phalanx_worker.node.isolation import Confinement, Cores, Isolation
from phalanx_worker.runtime import confine
from phalanx_worker.runtime.spec import CgroupSpec

IN_A_CONTAINER_V2 = "2048 2040 0:30 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
ON_A_HOST_V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw"
ON_A_HOST_V1 = """34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"""
IN_A_CONTAINER_V1 = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
FS = "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("membership", "mounts", "expected"),
    [
        ("0::/", IN_A_CONTAINER_V2, {"": FS}),
        ("0::/user.slice/a.scope", ON_A_HOST_V2, {"": f"{FS}/user.slice/a.scope"}),
        (
            "4:memory:/one\n1:cpu,cpuacct:/\n0::/",
            ON_A_HOST_V1,
            {"memory": f"{FS}/memory/one", "cpu": f"{FS}/cpu,cpuacct", "": f"{FS}/unified"}
            | {"cpuacct": f"{FS}/cpu,cpuacct"},
        ),
        ("4:memory:/docker/abc", IN_A_CONTAINER_V1, {"memory": f"{FS}/memory"}),
        ("4:memory:/one", ON_A_HOST_V2, {}),
    ],
    ids=["container v2", "host v2", "host v1", "container v1", "not mounted"],
)
def test_own_control_groups_are_found(membership: str, mounts: str, expected: dict[str, str]) -> None:
    assert own_cgroups(membership, mounts) == {name: Path(path) for name, path in expected.items()}


@pytest.mark.parametrize(
    ("events", "said"),
    [("oom 2\noom_kill 1\n", "group"), ("oom 0\noom_kill 1\n", "node"), ("oom 0\noom_kill 0\n", "")],
)
def test_who_was_out_of_memory_in_v2(tmp_path: Path, events: str, said: str) -> None:
    (tmp_path / "memory.events").write_text(events)
    assert Cgroup(CgroupSpec([], [], []), tmp_path, 2).oom() == said


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    found = cgroups._version_2(tmp_path)
    assert found.parents == {} and "belongs to others" in found.problem
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]


@pytest.fixture
def delegated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A control group of v2 that is ours to divide, with whatever controllers this machine has there."""
    mounts = Path("/proc/self/mountinfo").read_text()
    root = next((place for name, (_, place) in cgroups._hierarchies(mounts) if name == ""), None)
    available = cgroups._available(root)
    if root is None or not available or not os.access(root / "cgroup.subtree_control", os.W_OK):
        pytest.skip("no control groups v2 here that may be written")
    monkeypatch.setattr(cgroups, "_CONTROLLERS", tuple(available))
    monkeypatch.setattr(cgroups, "_is_ours", lambda own: True)
    for name in available:
        monkeypatch.setitem(cgroups._SETTINGS, (2, name), cgroups._SETTINGS.get((2, name), lambda limits: []))
    before = (root / "cgroup.subtree_control").read_text().split()
    cgroups._hand_down(root)
    own = root / "phalanx-test"
    own.mkdir()
    yield own
    for path in [*own.glob("phalanx*/*/"), *own.glob("phalanx*/"), own]:
        path.rmdir()
    for name in set(available) - set(before):
        (root / "cgroup.subtree_control").write_text(f"-{name}")


def test_v2_is_divided_used_and_cleared_away(delegated: Path) -> None:
    (delegated / "cgroup.procs").touch()
    with subprocess.Popen(["sleep", "60"]) as runner:
        (delegated / "cgroup.procs").write_text(str(runner.pid))
        try:
            found = cgroups._version_2(delegated)
            assert (delegated / "phalanx.node" / "cgroup.procs").read_text().split() == [str(runner.pid)]
            again = cgroups._version_2(delegated / "phalanx.node")  # as a second runner in the same container sees it
            assert again == found and set(found.parents.values()) == {delegated / "phalanx"}
            _use(found)
            assert not (delegated / "phalanx").exists()
        finally:
            runner.kill()


def _use(found: Cgroups) -> None:
    cgroup = found.make("att-0", Limits())
    rank = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: confine.enter(cgroup.spec, None))
    assert (found.parents.popitem()[1] / "att-0" / "cgroup.procs").read_text().split() == [str(rank.pid)]
    confine.end(cgroup.spec)
    assert rank.wait(5) == -signal.SIGKILL
    cgroup.remove()


def test_what_a_dead_runner_left_is_ended_though_it_hides_and_removed() -> None:
    found = Cgroups.find()
    if not found.parents:
        pytest.skip(found.problem)
    cgroup = found.make(f"test-{os.getpid()}-0", Limits())
    join = cgroup.spec.join
    hidden = subprocess.Popen(["sleep", "60"], env={}, preexec_fn=lambda: confine.enter(CgroupSpec(join, [], []), None))
    try:
        found.clear(f"test-{os.getpid()}-0")
        assert hidden.wait(5) == -signal.SIGKILL
        assert [path for path in cgroup.spec.directories if Path(path).exists()] == []
    finally:
        hidden.kill()
        hidden.wait()
        cgroup.remove()


def test_a_limit_that_cannot_be_set_is_an_error(tmp_path: Path) -> None:
    """A plain directory takes the place of the kernel's, so no file is there before."""
    (tmp_path / "phalanx").mkdir()
    with pytest.raises(OSError, match=r"pids\.max"):
        Cgroups(1, {"pids": tmp_path / "phalanx"}).make("att-0", Limits())


def test_a_parent_that_another_has_made_anew_meanwhile_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not handed its controllers down yet: a leaf in it would have no limits."""
    parent, looked = tmp_path / "phalanx", []
    hand_down = cgroups._hand_down

    def made_anew_at_first(directory: Path) -> None:
        looked.append(directory)
        if len(looked) > 1:
            return hand_down(directory)
        directory.rmdir()
        try:
            hand_down(directory)
        finally:
            directory.mkdir()
            (directory / "cgroup.controllers").write_text("pids")

    monkeypatch.setattr(cgroups, "_hand_down", made_anew_at_first)
    Cgroups(2, {"pids": parent})._make(parent / "att-0")
    assert looked == [parent, parent]
    assert (parent / "cgroup.subtree_control").read_text() == "+pids"
    assert (parent / "att-0").is_dir()


def test_groups_come_and_go_beside_each_other_in_the_same_parent() -> None:
    """The last one to leave removes the parent, at any moment of another's coming. A runner that starts meanwhile finds
    the same controllers as before."""
    found = Cgroups.find()
    if not found.parents:
        pytest.skip(found.problem)

    def come_and_go(name: str) -> None:
        for _ in range(300):
            found.make(name, Limits()).remove()

    with ThreadPoolExecutor(4) as threads:
        going = [threads.submit(come_and_go, f"test-{os.getpid()}-{i}") for i in range(3)]
        finding = [threads.submit(Cgroups.find) for _ in range(100)]
        assert {str(each.result()) for each in finding} == {str(found)}
        assert [each.result() for each in going] == [None] * 3


def test_what_is_enforced_is_said_of_each_limit(tmp_path: Path) -> None:
    found = Cgroups(2, {"memory": tmp_path, "cpu": tmp_path}, "no controller pids")
    said = Isolation(found, "", []).in_words
    assert said == "memory, cpu by control groups v2; processes not limited (no controller pids); own mounts"


def test_cores_are_shared_out_the_least_used_first_and_given_back_once() -> None:
    cores = Cores(own=[2, 3, 0, 1])
    first, second = cores.take(2), cores.take(1)
    assert (first, second) == ([2, 3], [0])
    assert cores.take(4) is None and cores.take(0) is None
    confinement = Confinement(cores, cores=first)
    confinement.release()
    confinement.release()
    assert cores.take(2) == [2, 3]
    assert cores.take(1) == [1], "none counts as less than unused"


def test_not_every_runner_of_a_machine_begins_with_the_same_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})
    own = [Cores().own for _ in range(100)]
    assert all(each in ([4, 5, 6], [5, 6, 4], [6, 4, 5]) for each in own)
    assert len({tuple(each) for each in own}) > 1, "one in 3**99 times by chance"


@pytest.mark.parametrize(
    ("written", "size_bytes"), [("64GiB", 64 << 30), ("512 MiB", 512 << 20), ("0", 0), ("1.5GiB", 3 << 29)]
)
def test_sizes_are_read_as_people_write_them(written: str, size_bytes: int) -> None:
    assert sizes.read(written) == size_bytes


@pytest.mark.parametrize("written", ["", "64GB", "-1", "64 gib", "many"])
def test_what_is_no_size_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        sizes.read(written)
