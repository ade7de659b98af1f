"""The agent and the node runners on a real, emulated Ray cluster; only the server is played by the test."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from link_server import FakeServer, attempt_of
from phalanx_worker.protocol import DesiredAttempt, Environment

pytestmark = pytest.mark.ray

BOTH = {"node-0": [0, 1], "node-1": [0, 1]}
START_TIMEOUT_S = 90.0  # the first start waits until torch is imported on both nodes
NODE_LOSS_TIMEOUT_S = 40.0

# Prints which calls of actors Ray's GCS keeps. The last of each runner asks to be kept; as a runner's events are told
# in their order, GCS has heard of all before it too.
KEPT_CALLS = """
import sys, time
from pathlib import Path
from phalanx_worker.agent.ray_environment import prepare, read_ray_file
prepare(address := read_ray_file(Path(sys.argv[1])))
import ray
from ray._private.state import state
from ray.core.generated.common_pb2 import RUNNING
ray.init(address=address, namespace="phalanx", log_to_driver=False)
runners = ray.util.list_named_actors()
for runner in runners:
    ray.get(ray.get_actor(runner).__ray_ready__.options(enable_task_events=True).remote())
told = 0
while told < len(runners):
    time.sleep(0.1)
    calls = [task for task in state._get_all_task_events() if task.task_info.actor_id]
    told = sum("ready" in call.task_info.name and RUNNING in call.state_updates.state_ts_ns for call in calls)
print(*(call.task_info.name for call in calls))
"""
NUMBERS = itertools.count(1)  # an attempt runs once: its id is never used again, not even with another server


def phalanx(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "phalanx", *arguments], stdout=out, stderr=out)


def killed(find: Callable[[], psutil.Process | None]) -> None:
    """Kill what `find` finds, and wait until it finds another."""

    def found() -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):  # it ended while one looked
            return find()
        return None

    old = found()
    assert old is not None
    old.kill()
    wait_until(lambda: (new := found()) is not None and new != old, 30)


def wait_until(what: Callable[[], object], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ray_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data directory of a local Ray cluster of two nodes; afterwards nothing of it may be left."""
    directory = tmp_path_factory.mktemp("ray")
    process = phalanx(
        *("local-ray", "--nodes", "2", "--gpus-per-node", "2", "--respawn", "--data", str(directory / "ray")),
        log=directory / "local-ray.log",
    )
    try:
        wait_until(lambda: (directory / "ray/ray.json").exists() or process.poll() is not None, 60)
        assert process.poll() is None, (directory / "local-ray.log").read_text()
        temp_dir = Path((directory / "ray/ray-temp-dir").read_text())
        assert temp_dir.stat().st_mode & 0o777 == 0o700
        assert (directory / "ray/ray-token").stat().st_mode & 0o777 == 0o600
        yield directory / "ray"
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert not temp_dir.exists()


class Site:
    """A server and the agents that serve it."""

    def __init__(self, ray_dir: Path, directory: Path) -> None:
        self.ray_dir, self.directory = ray_dir, directory
        self.server = FakeServer()
        self.server.start()
        (directory / "token").write_text("the-cluster-token\n")
        self.agent = self.start_agent()

    def start_agent(self, *more: str) -> subprocess.Popen[bytes]:
        self.agent = phalanx(
            *("agent", "--server", self.server.url, "--token-file", str(self.directory / "token")),
            *("--ray-file", str(self.ray_dir / "ray.json"), "--no-own-users"),
            *("--data", str(self.ray_dir / "nodes"), "--checkpoint-root", str(self.directory / "checkpoints")),
            *more,
            log=self.directory / "agent.log",
        )
        return self.agent

    def kill_agent(self) -> None:
        self.agent.kill()
        self.agent.wait()

    def sleeping(self, name: str, command: str = "sleep 300", **more: object) -> DesiredAttempt:
        """A gang on all GPUs that is up."""
        attempt = attempt_of(name, command, BOTH, **more)
        self.server.want(attempt)
        self.server.fact(name, "started", START_TIMEOUT_S)
        return attempt

    def all_gpus_are_free(self) -> None:
        """A gang that needs them all starts, and ends well."""
        name = f"att_next{next(NUMBERS)}"
        self.server.want(attempt_of(name, "true", BOTH))
        assert [end.exit_code for end in self.server.fact(name, "ended", START_TIMEOUT_S).exits] == [0, 0, 0, 0]

    def close(self) -> None:
        self.agent.terminate()
        assert self.agent.wait(10) == 0, (self.directory / "agent.log").read_text()
        self.server.stop()


@pytest.fixture
def site(ray_dir: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(ray_dir, tmp_path)
    try:
        site.server.wait_for(lambda: len(site.server.nodes) == 2, 30)
        yield site
    except BaseException:
        print((tmp_path / "agent.log").read_text())
        raise
    finally:
        site.close()


def test_a_gang_runs_on_two_nodes_with_torchruns_environment(site: Site, tmp_path: Path) -> None:
    command = "sh -c 'env > $OUT/$RANK'"
    started_s = time.time()
    site.server.want(attempt_of("att_env", command, BOTH, cpus=1.0, env={"OUT": str(tmp_path)}))
    started = site.server.fact("att_env", "started", START_TIMEOUT_S)
    ended = site.server.fact("att_env", "ended")
    ready = site.server.fact("att_env", "gang_ready")
    assert [(start.rank, start.node) for start in started.ranks_started] == [
        *((0, "node-0"), (1, "node-0")),
        *((2, "node-1"), (3, "node-1")),
    ]
    assert [(end.rank, end.exit_code) for end in ended.exits] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert started_s <= ready.at <= started.at <= ended.at
    env = dict(line.split("=", 1) for line in (tmp_path / "3").read_text().splitlines() if "=" in line)
    expected = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "att_env",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert not [name for name in env if name.startswith("RAY_")], "Ray's token must not be in reach"
    for _ in range(5):
        site.all_gpus_are_free()


def test_rays_gcs_keeps_nothing_of_a_runners_calls(site: Site) -> None:
    site.all_gpus_are_free()
    ray_file = site.ray_dir / "ray.json"
    told = subprocess.run([sys.executable, "-c", KEPT_CALLS, ray_file], capture_output=True, text=True, timeout=60)
    assert told.stdout.split() == ["NodeRunner.__ray_ready__"] * 2, told.stderr


def test_one_failing_rank_ends_the_gang(site: Site) -> None:
    site.server.want(attempt_of("att_fail", "sh -c 'test $RANK != 2 || exit 7; sleep 300'", BOTH))
    ended = site.server.fact("att_fail", "ended", START_TIMEOUT_S)
    assert ended.first_failed_rank == 2
    assert [(end.exit_code, end.signal) for end in ended.exits] == [(None, 15), (None, 15), (7, None), (None, 15)]
    site.all_gpus_are_free()


def test_a_stop_ends_the_gang(site: Site) -> None:
    site.sleeping("att_stop")
    site.server.want_stopped("att_stop", grace_s=5.0)
    assert [end.signal for end in site.server.fact("att_stop", "ended").exits] == [15, 15, 15, 15]
    site.all_gpus_are_free()


@pytest.mark.slow
def test_an_environment_is_built_on_every_node_or_fails_the_start_for_good(site: Site, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os, sys, numpy; sys.exit(sys.prefix != os.environ['VIRTUAL_ENV'])")
    there = Environment(["--no-index", "numpy"])  # which the nodes' Python has, so nothing is fetched
    site.server.want(attempt_of("att_built", f"python {script}", BOTH, environment=there))
    started = site.server.fact("att_built", "started", START_TIMEOUT_S)
    assert all(start.warm for start in started.ranks_started)
    assert [end.exit_code for end in site.server.fact("att_built", "ended", START_TIMEOUT_S).exits] == [0, 0, 0, 0]

    nowhere = Environment(["--no-index", "phx-nosuch==1"])
    site.server.want(attempt_of("att_refused", f"python {script}", BOTH, environment=nowhere))
    failed = site.server.fact("att_refused", "start_failed", START_TIMEOUT_S)
    assert failed.permanent
    assert "No matching distribution found for phx-nosuch==1" in failed.message
    site.all_gpus_are_free()


def test_a_program_that_does_not_exist_ends_the_gang_or_its_start(site: Site) -> None:
    site.server.want(attempt_of("att_none", "/no/such/program", BOTH))
    site.server.wait_for(lambda: site.server.seen("att_none", "start_failed") or site.server.seen("att_none", "ended"))
    site.all_gpus_are_free()


def test_a_killed_agent_is_replaced_without_a_rank_noticing(site: Site) -> None:
    site.sleeping("att_adopt", "sleep 300")
    pids = [start.pid for start in site.server.fact("att_adopt", "started").ranks_started]
    site.kill_agent()
    site.start_agent()
    site.server.wait_for(lambda: len(site.server.seen("att_adopt", "started")) == 2, 30)
    assert [start.pid for start in site.server.seen("att_adopt", "started")[1][1].ranks_started] == pids
    assert all(psutil.pid_exists(pid) for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert {end.signal for end in site.server.fact("att_adopt", "ended").exits} == {9}
    site.all_gpus_are_free()


def test_what_the_server_no_longer_wants_is_removed_by_the_next_agent(site: Site) -> None:
    site.sleeping("att_stranger")
    pids = [start.pid for start in site.server.fact("att_stranger", "started").ranks_started]
    site.kill_agent()
    site.server.drop("att_stranger")
    site.start_agent()
    for node in BOTH:
        assert site.server.fact("att_stranger", "gone", 30, node=node).epoch == 1
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    site.all_gpus_are_free()


@pytest.mark.slow
def test_a_dead_runner_ends_its_ranks_and_is_replaced(site: Site) -> None:
    _runner(_started(site, "att_runner")[2].pid).kill()
    ended = site.server.fact("att_runner", "ended", 30)
    assert [(end.exit_code, end.signal) for end in ended.exits][2:] == [(None, None), (None, None)]
    assert ended.node == "node-1"
    site.all_gpus_are_free()


@pytest.mark.slow
def test_a_hung_runner_is_killed_and_replaced(site: Site) -> None:
    starts = _started(site, "att_hung")
    site.kill_agent()
    site.start_agent("--runner-silent-s", "5")
    site.server.wait_for(lambda: len(site.server.seen("att_hung", "started")) == 2, 30)
    runner = _runner(starts[2].pid)
    runner.suspend()
    ended = site.server.fact("att_hung", "ended", 60)
    assert [(end.exit_code, end.signal) for end in ended.exits][2:] == [(None, None), (None, None)]
    assert ended.node == "node-1"
    assert not [start.pid for start in starts if psutil.pid_exists(start.pid)]
    wait_until(lambda: not runner.is_running(), 20)  # Ray asks it first, for 5 s
    site.all_gpus_are_free()


def test_an_agent_that_another_has_replaced_ends(site: Site) -> None:
    site.server.superseded.add(site.server.instance)
    assert site.agent.wait(15) == 1
    assert "another agent has taken over" in (site.directory / "agent.log").read_text()
    site.start_agent()
    site.all_gpus_are_free()


@pytest.mark.slow
def test_a_lost_node_is_reported_and_comes_back(site: Site) -> None:
    site.sleeping("att_lost")
    raylet = _raylet(site.ray_dir, "node-1")
    assert raylet is not None
    raylet.kill()
    site.server.wait_for(
        lambda: {node.name: node.alive for node in site.server.nodes} == {"node-0": True, "node-1": False},
        NODE_LOSS_TIMEOUT_S,
    )
    assert not site.server.seen("att_lost", "ended")
    site.server.drop("att_lost")
    site.server.fact("att_lost", "gone", NODE_LOSS_TIMEOUT_S, node="node-0")
    site.server.fact("att_lost", "gone", NODE_LOSS_TIMEOUT_S, node="node-1")
    assert all(node.alive for node in site.server.nodes)
    site.all_gpus_are_free()


def test_a_killed_gcs_comes_back_without_a_rank_noticing(site: Site) -> None:
    starts = _started(site, "att_gcs")
    killed(lambda: _gcs(site.ray_dir))
    _ends_when_told(site, "att_gcs", starts)


@pytest.mark.slow
def test_the_heads_killed_raylet_is_replaced_and_an_agent_joins_again(site: Site) -> None:
    """An agent that had joined through it ends with it; whoever runs agents starts them again."""
    starts = _started(site, "att_head")
    killed(lambda: _raylet(site.ray_dir, "head"))
    site.kill_agent()
    site.start_agent()
    site.server.wait_for(lambda: len(site.server.seen("att_head", "started")) == 2, 60)
    _ends_when_told(site, "att_head", starts)


def _ends_when_told(site: Site, name: str, starts: list) -> None:
    """The ranks that were started still run, and the agent has a hold of them."""
    ranks = [psutil.Process(start.pid) for start in starts]  # a cold one may not have come to its command yet
    site.server.wait_for(lambda: all(rank.cmdline()[:1] == ["sleep"] for rank in ranks), 60)
    site.server.want_stopped(name, grace_s=5.0)
    assert [end.signal for end in site.server.fact(name, "ended", 60).exits] == [15, 15, 15, 15]
    site.all_gpus_are_free()


def _started(site: Site, name: str) -> list:
    site.sleeping(name)
    return site.server.fact(name, "started").ranks_started


def _runner(pid: int) -> psutil.Process:
    """The runner of this rank."""
    return next(parent for parent in psutil.Process(pid).parents() if "NodeRunner" in " ".join(parent.cmdline()))


def _children(ray_dir: Path) -> list[psutil.Process]:
    local_ray = psutil.Process(json.loads((ray_dir / "ray.json").read_text())["pid"])
    return [child for child in local_ray.children() if child.status() != psutil.STATUS_ZOMBIE]


def _gcs(ray_dir: Path) -> psutil.Process | None:
    return next((each for each in _children(ray_dir) if each.name() == "gcs_server"), None)


def _raylet(ray_dir: Path, label: str) -> psutil.Process | None:
    """The raylet whose labels have this value."""
    raylets = (each for each in _children(ray_dir) if each.name() == "raylet")
    return next((each for each in raylets if any(f'"{label}"' in argument for argument in each.cmdline())), None)
