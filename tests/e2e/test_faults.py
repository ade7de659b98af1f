"""Faults, made for real with kill -9, while a gang of two nodes trains: what must survive does, and what is lost ends.

Each test kills something of a whole Phalanx (`phalanx up`) and looks at it through its API, as a user would.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import phalanx
import psutil
import pytest
from phalanx_server.store.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 90.0
AWAY = (phalanx.errors.ConnectionFailed, phalanx.errors.Unavailable)

# Steps until a file appears; a rank that is told to save does so each step, and starts again from there.
TRAINING = """
import os, sys, time
import torch, torch.distributed as dist
import phalanx

dist.init_process_group("gloo")
rank, saves = dist.get_rank(), "--save" in sys.argv
resume = os.environ.get("PHALANX_RESUME_FROM", "")
step = int(open(resume.removeprefix("file://")).read()) if resume else 0
while True:
    votes = torch.tensor([float(os.path.exists(os.environ["FINISH"]))])
    dist.all_reduce(votes)
    if votes[0]:
        break
    step += 1
    if rank == 0:
        print("step", step, flush=True)
        phalanx.report(step=step, loss=1.0 / step)
        if saves and step % 10 == 0:
            path = os.path.join(os.environ["PHALANX_CHECKPOINT_DIR"], f"{step}.txt")
            with open(path, "w") as file:
                file.write(str(step))
            phalanx.checkpoint(path, step=step)
    time.sleep(0.02)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def phalanx_up(make_up: Callable[..., object]) -> Iterator[object]:
    with make_up() as running:
        yield running


class Training:
    """One running job of two nodes, and what it has printed and reported so far."""

    def __init__(self, running: object, *, saves: bool = False, **more: object) -> None:
        self.running = running
        self.client: phalanx.Client = running.client()
        self.flag = Path("/tmp") / f"phx-finish-{uuid.uuid4().hex}"
        self.workdir = running.data / "workdir"
        self.workdir.mkdir(exist_ok=True)
        (self.workdir / "train.py").write_text(TRAINING)
        document = {
            "name": "survivor",
            "tenant": "default",
            "resources": {"replicas": 2, "gpus_per_replica": 2},
            "run": {"command": "python train.py" + " --save" * saves, "env": {"FINISH": str(self.flag)}},
            **more,
        }
        self.id = self.client.submit(document, workdir=self.workdir).id

    @property
    def job(self) -> phalanx.models.Job:
        """As the server says, as soon as there is one again."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.client.job(self.id)
            except AWAY:
                assert time.monotonic() < deadline_s, "the server does not come back"
                time.sleep(0.1)

    def step(self) -> int:
        progress = self.job.progress
        return progress.step or 0 if progress else 0

    def wait(self, what: Callable[[], object], why: str, timeout_s: float = PATIENCE_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if what():
                    return
            except AWAY:
                pass
            assert time.monotonic() < deadline_s, f"{why}: not within {timeout_s:g} s"
            time.sleep(0.1)

    def wait_steps(self, more: int = 20) -> int:
        """Until the server has heard of so many more steps; the last of them."""
        before = self.step()
        self.wait(lambda: self.step() >= before + more, f"{more} steps after {before}")
        return self.step()

    def finish(self) -> phalanx.models.Job:
        self.flag.touch()
        return self.client.wait(self.id, timeout_s=PATIENCE_S)

    def close(self) -> None:
        self.flag.touch()
        job = self.client.wait(self.id, timeout_s=PATIENCE_S)
        self.flag.unlink()
        assert job.ended

    def is_told_whole(self) -> None:
        """Every step from the first to the last is in the logs and in the metrics, each once."""
        steps = [int(found) for found in re.findall(r"^step (\d+)$", self.client.logs(self.id, rank=0), re.MULTILINE)]
        assert steps == list(range(1, len(steps) + 1))
        (loss,) = self.client.metrics(self.id, names=["loss"])
        assert sum(point.count for point in loss.points) == len(steps)
        states = [event.kind for event in self.client.events(self.id) if event.kind in ("starting", "running")]
        assert states == ["starting", "running"], "it ran once"


@pytest.fixture
def training(phalanx_up: object) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def start(**more: object) -> Training:
        job = Training(phalanx_up, **more)
        started.append(job)
        job.wait(lambda: job.step() > 10, "it trains")
        return job

    yield start
    for job in started:
        job.close()


def child(running: object, name: str) -> psutil.Process:
    """The living process of a part of `phalanx up`."""
    for process in psutil.Process(running.process.pid).children():
        words = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
        if words[1:4] == ["-m", "phalanx", name]:
            return process
    raise AssertionError(f"no {name} runs")


def part(running: object, name: str) -> psutil.Process:
    """The process to kill for `name`."""
    if name == "postgres":
        pid = EmbeddedPostgres(running.data / "postgres").pid()
        assert pid is not None
        return psutil.Process(pid)
    if name == "gcs":
        return next(each for each in child(running, "local-ray").children() if each.name() == "gcs_server")
    return child(running, name)


CONTROL_PLANE = ["server", "scheduler", "agent", "postgres"]


@pytest.mark.parametrize("names", [*([name] for name in CONTROL_PLANE), CONTROL_PLANE, ["gcs"]], ids="+".join)
def test_training_outlives_what_controls_it(phalanx_up, training, names: list[str]) -> None:
    job = training()
    processes = [part(phalanx_up, name) for name in names]
    for process in processes:
        process.kill()
    job.wait(lambda: all(not process.is_running() for process in processes), "they die")
    job.wait_steps(100)
    assert (job.job.state, job.job.attempts) == ("running", 1)
    assert job.finish().state == "succeeded"
    job.is_told_whole()
    after = job.client.submit(
        {"name": "after", "tenant": "default", "resources": {"gpus": 4}, "run": {"command": "true"}}
    )
    assert job.client.wait(after.id, timeout_s=PATIENCE_S).state == "succeeded", "all GPUs are free again"


def rank_pid(job: Training, rank: int) -> int:
    return next(each.pid for each in job.job.attempt.ranks if each.rank == rank)


def test_a_killed_rank_ends_its_attempt_and_the_next_goes_on_from_the_checkpoint(phalanx_up, training) -> None:
    job = training(saves=True, retries={"max": 1, "backoff": "1s"})
    job.wait_steps()
    psutil.Process(rank_pid(job, 3)).kill()
    job.wait(lambda: job.job.attempts == 2 and job.job.state == "running", "it is retried")
    first, second = sorted(job.client.attempts(job.id), key=lambda attempt: attempt.number)
    assert first.outcome == "failed" and "rank 3 was ended by SIGKILL" in first.message
    assert {end.rank for end in first.exits} == {0, 1, 2, 3}, "it ended as a whole"
    saved = int(re.search(r"(\d+)\.txt$", second.resume_from).group(1))
    job.wait(lambda: job.step() > saved, "it goes on")
    psutil.Process(rank_pid(job, 0)).kill()
    assert job.client.wait(job.id, timeout_s=PATIENCE_S).state == "failed", "its limit is one retry"


def test_a_killed_warm_process_ends_no_rank_and_the_next_job_starts(phalanx_up, training) -> None:
    job = training()
    rank = psutil.Process(rank_pid(job, 0))
    guardian, warm = (each for each in rank.parents() if "phalanx_worker.runtime.boot" in each.cmdline())
    assert warm == guardian.parent()
    warm.kill()
    job.wait_steps(50)
    assert job.finish().attempts == 1
    job.is_told_whole()
    after = job.client.submit(
        {"name": "after", "tenant": "default", "resources": {"gpus": 4}, "run": {"command": "true"}}
    )
    assert job.client.wait(after.id, timeout_s=PATIENCE_S).state == "succeeded"


def test_a_killed_runner_loses_its_ranks_and_the_job_goes_on(phalanx_up, training) -> None:
    job = training(saves=True, retries={"max": 0, "backoff": "1s"})
    job.wait_steps()
    rank = psutil.Process(rank_pid(job, 3))
    next(parent for parent in rank.parents() if "NodeRunner" in " ".join(parent.cmdline())).kill()
    job.wait(lambda: job.job.attempts == 2 and job.job.state == "running", "it runs again, and no retry is used up")
    assert job.job.failures == 0
    job.wait_steps()
    assert job.finish().state == "succeeded"


def test_a_killed_node_loses_its_attempt_the_job_goes_on_and_the_node_comes_back(phalanx_up, training) -> None:
    job = training(saves=True, restart="eager")
    job.wait_steps()
    nodes = child(phalanx_up, "local-ray").children()
    raylet = next(p for p in nodes if p.name() == "raylet" and any('"node-1"' in word for word in p.cmdline()))
    raylet.kill()
    job.wait(lambda: job.client.attempts(job.id)[0].outcome == "node_lost", "the attempt is lost")
    job.wait(lambda: job.job.attempts == 2 and job.job.state == "running", "the node is back and used again")
    assert {place.node for place in job.job.attempt.placements} == {"node-0", "node-1"}
    assert job.job.attempt.resume_from
    job.wait_steps()
    assert job.finish().state == "succeeded"
