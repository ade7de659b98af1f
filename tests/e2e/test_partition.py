"""The network breaks, for real: what is cut off ends by itself where it must, goes on where it may, and comes back."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import phalanx
import psutil
import pytest
from machines_apart import FENCE_S, GRACE_S, PATIENCE_S, Network, Site, missing, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Running, with three nodes of one GPU; the test itself is on a machine of that network too."""
    if why := missing():
        pytest.skip(why)
    data = Path(tempfile.mkdtemp(prefix="phx-e2e-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        network = Network()
        stack.callback(network.close)
        site = Site(data, network, nodes=3)
        stack.callback(site.stop)
        network.add("desk")
        stack.enter_context(network.standing_on("desk"))
        site.start()
        stack.callback(site.client.close)
        yield site


# Steps until a file appears. Meanwhile each rank goes on with every kind of report, even while the gang hangs; the last
# one saves what the next attempt goes on from.
TRAINING = """
import os, threading, time
import torch, torch.distributed as dist
import phalanx

dist.init_process_group("gloo")
rank, last = dist.get_rank(), dist.get_world_size() - 1
directory, attempt = os.environ["PHALANX_CHECKPOINT_DIR"], os.environ["PHALANX_ATTEMPT"]
resume = os.environ.get("PHALANX_RESUME_FROM", "")
step = int(open(resume.removeprefix("file://")).read()) if resume else 0
print("from", step, flush=True)

def tick():
    while True:
        now = time.time()
        with open(f"{directory}/ticks-{attempt}-{rank}", "a") as file:
            file.write(f"{now}\\n")
        print("tick", now, flush=True)
        phalanx.report(tick=now)
        if rank == last and step:
            with open(f"{directory}/{now}.txt", "w") as file:
                file.write(str(step))
            phalanx.checkpoint(file.name, step=step)
        time.sleep(0.2)

threading.Thread(target=tick, daemon=True).start()
while True:
    votes = torch.tensor([float(os.path.exists(os.environ["FINISH"]))])
    dist.all_reduce(votes)
    if votes[0]:
        break
    step += 1
    if rank == 0:
        print("step", step, flush=True)
        phalanx.report(step=step, loss=1.0 / step)
    time.sleep(0.05)
dist.destroy_process_group()
"""


class Training:
    """A running job on two of the nodes, and the processes of its first attempt."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.client = site.client
        self.flag = site.data / f"finish-{uuid.uuid4().hex}"
        workdir = site.data / "workdir"
        workdir.mkdir(exist_ok=True)
        (workdir / "train.py").write_text(TRAINING)
        document = {
            "name": "gang",
            "tenant": "default",
            "resources": {"replicas": 2, "gpus_per_replica": 1},
            "run": {"command": "python train.py", "env": {"FINISH": str(self.flag)}},
        }
        self.id = self.client.submit(document, workdir=workdir).id
        wait_for(self._trains, "it trains and saves")
        self.first = self.attempts()[0]
        self.nodes = {start.rank: start.node for start in self.first.ranks}
        self.processes = {start.rank: psutil.Process(start.pid) for start in self.first.ranks}

    def _trains(self) -> bool:
        assert not self.job.ended, f"{self.job.message}: {self.client.logs(self.id)}"
        return self.step() > 20 and self.job.checkpoint is not None

    @property
    def job(self) -> phalanx.models.Job:
        return self.client.job(self.id)

    def attempts(self) -> list[phalanx.models.Attempt]:
        return sorted(self.client.attempts(self.id), key=lambda attempt: attempt.number)

    def step(self) -> int:
        progress = self.job.progress
        return progress.step or 0 if progress else 0

    def ticks(self, attempt: int, rank: int) -> list[float]:
        """As the rank itself wrote them down, where no network is in between."""
        ticks = self.site.data / "checkpoints" / self.id / f"ticks-{attempt}-{rank}"
        return [float(tick) for tick in ticks.read_text().splitlines()]

    def told_ticks(self, attempt: int, rank: int) -> list[float]:
        """As the server has them, in the rank's log."""
        log = self.client.logs(self.id, rank=rank, attempt=attempt)
        return [float(tick) for tick in re.findall(r"^tick (\S+)$", log, re.MULTILINE)]

    def last_tick(self, attempt: int, rank: int) -> float:
        return self.ticks(attempt, rank)[-1]

    def told_tick(self, attempt: int, rank: int) -> float:
        return self.told_ticks(attempt, rank)[-1]

    def finish(self) -> phalanx.models.Job:
        self.flag.touch()
        return self.client.wait(self.id, timeout_s=PATIENCE_S)


@pytest.fixture
def training(site: Site) -> Iterator[Training]:
    training = Training(site)
    yield training
    assert training.finish().ended


class Ends(threading.Thread):
    """Sees when processes end; `at` has the time of each that has."""

    def __init__(self, processes: Mapping[int, psutil.Process]) -> None:
        super().__init__(daemon=True)
        self.processes = dict(processes)
        self.at: dict[int, float] = {}
        self.start()

    def run(self) -> None:
        while len(self.at) < len(self.processes):
            for rank, process in self.processes.items():
                if rank not in self.at and not _lives(process):
                    self.at[rank] = time.time()
            time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("whole_cluster", [True, False], ids=["the whole cluster", "one node"])
def test_ranks_that_do_not_reach_the_server_go_on_and_what_they_said_arrives(
    site: Site, training: Training, whole_cluster: bool
) -> None:
    """For longer than the fence: that is for nodes that Ray and the agent do not reach either."""
    network, node = site.network, training.nodes[1]
    with network.cut_off("control") if whole_cluster else network.cut_off_from(node, "control") as cut_at:
        wait_for(lambda: training.last_tick(1, 1) > cut_at + 1.5 * FENCE_S, "they go on")
        assert all(_lives(process) for process in training.processes.values())
        assert training.first.id in spooled(site, node)
    healed_at = time.time()
    wait_for(lambda: min(training.told_tick(1, rank) for rank in (0, 1)) > healed_at, "what was spooled arrives")
    job = training.finish()
    assert (job.state, job.attempts) == ("succeeded", 1)
    for rank in (0, 1):
        written, told = training.ticks(1, rank), training.told_ticks(1, rank)
        assert told in (written, written[:-1]), "all of it, each once; it may have ended before it said its last"
    steps = [int(each) for each in re.findall(r"^step (\d+)$", training.client.logs(training.id, rank=0), re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    (loss,) = training.client.metrics(training.id, names=["loss"])
    assert sum(point.count for point in loss.points) == len(steps)


def test_a_node_that_is_cut_off_ends_its_ranks_before_the_job_goes_on_elsewhere_and_comes_back_clean(
    site: Site, training: Training
) -> None:
    node, ends = training.nodes[1], Ends(training.processes)
    with site.network.cut_off(node) as cut_at:
        wait_for(lambda: training.job.attempts == 2 and training.job.state == "running", "it runs again")
        check_ranks_ended_by_themselves(training, ends.at, cut_at)
        check_it_goes_on_from_its_last_checkpoint(training, node, cut_at)
        assert training.first.id in spooled(site, node), "there is something to refuse"
    wait_for(lambda: training.first.id not in spooled(site, node), "what was spooled is sent")
    check_nothing_late_was_stored(site, training, cut_at)
    check_the_node_is_used_again(site, training, node)


def check_ranks_ended_by_themselves(training: Training, ended_at: Mapping[int, float], cut_at: float) -> None:
    """As the processes themselves show: the server's word is not asked."""
    assert cut_at + FENCE_S / 2 < ended_at[1] < cut_at + FENCE_S + GRACE_S
    assert ended_at[1] - 1 < training.last_tick(1, 1) <= ended_at[1], "it went on until then"
    started_at = [psutil.Process(start.pid).create_time() for start in training.attempts()[1].ranks]
    assert max(ended_at.values()) < min(started_at) - FENCE_S / 4, "and not by a hair's breadth"


def check_it_goes_on_from_its_last_checkpoint(training: Training, node: str, cut_at: float) -> None:
    first, second = training.attempts()
    assert (first.state, first.outcome, first.message) == ("lost", "node_lost", f"node {node} was lost")
    assert node not in {start.node for start in second.ranks}
    assert training.job.failures == 0
    saved_at = float(re.search(r"([\d.]+)\.txt$", second.resume_from or "")[1])
    assert cut_at - 2 < saved_at < cut_at + 0.1, "the last one that the server had heard of"
    log = wait_for(lambda: training.client.logs(training.id, rank=0), "it says where it begins")
    assert f"from {Path(second.resume_from.removeprefix('file://')).read_text()}\n" in log
    step = training.step()
    wait_for(lambda: training.step() > step, "it trains")


def spooled(site: Site, node: str) -> str:
    """All that waits on the node's disk."""
    found = []
    for path in (site.data / "nodes" / node / "spool").glob("*.batch"):
        with suppress(FileNotFoundError):
            found.append(path.read_text())
    return "".join(found)


def check_nothing_late_was_stored(site: Site, training: Training, cut_at: float) -> None:
    """Its rank went on reporting for seconds after the cut, until the fence ended it."""
    late = cut_at + 0.1
    assert training.last_tick(1, 1) > late + FENCE_S / 4
    assert training.told_tick(1, 1) < late
    which = f"WHERE attempt_id = '{training.first.id.removeprefix('att_')}'"
    (tick,) = site.query(f"SELECT max(value) FROM metrics {which} AND name = 'tick' AND rank = 1")
    assert cut_at - 5 < tick[0] < late
    for (url,) in site.query(f"SELECT url FROM checkpoints {which}"):
        assert float(Path(url).stem) < late
    notes = site.query(f"SELECT message FROM events {which} AND kind = 'note'")
    assert not notes, "not even that the node was cut off"


def check_the_node_is_used_again(site: Site, training: Training, node: str) -> None:
    wait_for(lambda: training.client.node(node).state == "ready", "it is back")
    assert training.client.node(node).gpus_used == 0
    ((released,),) = site.query(
        f"SELECT released_at FROM attempts WHERE id = '{training.first.id.removeprefix('att_')}'"
    )
    assert released is not None
    document = {"name": "after", "tenant": "default", "resources": {"gpus": 1}, "run": {"command": "true"}}
    after = training.client.wait(training.client.submit(document).id, timeout_s=PATIENCE_S)
    assert (after.state, [place.node for place in after.attempt.placements]) == ("succeeded", [node])
    assert (training.job.state, training.job.attempts) == ("running", 2), "the other goes on"
