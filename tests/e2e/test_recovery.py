"""A training of the `lm` recipe that is disturbed ends as one that is not: the same loss after the same steps, whatever
happened to it. On a real Ray cluster of two nodes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import phalanx
import psutil
import pytest

pytestmark = pytest.mark.slow
PATIENCE_S = 180.0
STEPS = 60
TOLERANCE = 2e-4  # of the final loss: sums over another number of ranks differ in their last bits


def text(words: int = 60_000) -> str:
    """Something to learn: a few hundred words, each followed by few others."""
    dice = random.Random(7)
    vocabulary = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 8))) for _ in range(300)]
    follows = {word: dice.choices(vocabulary, k=4) for word in vocabulary}
    said = [vocabulary[0]]
    for _ in range(words):
        said.append(dice.choice(follows[said[-1]]))
    return " ".join(said)


class Bench:
    """One cluster, one text, one configuration; and the loss at which an undisturbed training of it ends."""

    def __init__(self, client: phalanx.Client, directory: Path, up_pid: int) -> None:
        self.client, self.directory, self.up_pid = client, directory, up_pid
        directory.chmod(0o755)
        (directory / "text.txt").write_text(text())
        self.undisturbed = float("nan")

    def args(self, steps: int = STEPS) -> dict[str, Any]:
        return {
            "data": {"paths": [str(self.directory / "text.txt")], "seq_len": 64},
            "model": {"layers": 2, "width": 64, "heads": 4},
            "train": {"steps": steps, "global_batch": 12, "seed": 3},
            "optim": {"lr": 3e-3},
            "checkpoint": {"every_steps": 10},
        }

    def submit(self, name: str, *, resources: dict[str, Any] | None = None, **more: Any) -> str:
        run = {"recipe": "lm", "args": self.args()}
        given = {"name": name, "resources": resources or {"replicas": 2, "gpus_per_replica": 2}, "run": run}
        return self.client.submit(given | {"retries": {"max": 3, "backoff": 0}} | more).id

    def loss(self, job: str) -> float:
        """At its last step."""
        done = self.client.wait(job, timeout_s=PATIENCE_S)
        assert done.state == "succeeded", (done.message, self.client.logs(job, rank=0))
        assert done.progress is not None and done.progress.step == STEPS
        (series,) = list(self.client.metrics(job, names=["loss"]))
        last = series.points[-1]
        assert last.step == STEPS and last.mean is not None
        return float(last.mean)

    def ends_as_undisturbed(self, job: str) -> None:
        assert self.loss(job) == pytest.approx(self.undisturbed, rel=TOLERANCE)

    def at_step(self, job: str, step: int, attempt: int = 1) -> Any:
        """Its attempt, once it has come so far."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            found = self.client.job(job)
            assert found.state != "failed", (found.message, self.client.logs(job, rank=0))
            if found.attempts == attempt and found.progress and (found.progress.step or 0) >= step:
                return found.attempt
            assert time.monotonic() < deadline_s, f"{job} has not come to step {step}"
            time.sleep(0.05)

    def at_work(self, job: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.client.job(job).state != "running":
            assert time.monotonic() < deadline_s, f"{job} does not run"
            time.sleep(0.05)

    def raylet(self, node: str) -> psutil.Process:
        of_up = psutil.Process(self.up_pid).children(recursive=True)
        return next(p for p in of_up if p.name() == "raylet" and any(f'"{node}"' in word for word in p.cmdline()))

    def outcomes(self, job: str) -> list[str | None]:
        return [attempt.outcome for attempt in self.client.attempts(job)]


@pytest.fixture(scope="module")
def bench(make_up: Callable[..., AbstractContextManager[Any]], tmp_path_factory: Any) -> Iterator[Bench]:
    with make_up(nodes=2, gpus_per_node=2) as up, up.client() as client:
        bench = Bench(client, tmp_path_factory.mktemp("text"), up.process.pid)
        bench.undisturbed = bench.loss(bench.submit("undisturbed"))
        yield bench


def pid_of(attempt: Any, rank: int) -> int:
    return next(each.pid for each in attempt.ranks if each.rank == rank)


def test_a_rank_that_crashes(bench: Bench) -> None:
    job = bench.submit("crash")
    os.kill(pid_of(bench.at_step(job, 15), 3), signal.SIGKILL)
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["failed", "succeeded"]


def test_a_rank_that_hangs(bench: Bench) -> None:
    job = bench.submit("hang", health={"hang": {"action": "restart", "factor": 5, "at_least": "3s"}})
    os.kill(pid_of(bench.at_step(job, 15), 2), signal.SIGSTOP)
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["hung", "succeeded"]


def test_a_preemption(bench: Bench) -> None:
    job = bench.submit("victim", priority="low")
    bench.at_step(job, 15)
    run = {"command": "true"}
    above = bench.client.submit({"name": "above", "resources": {"gpus": 2}, "run": run, "priority": "high"}).id
    assert bench.client.wait(above, timeout_s=PATIENCE_S).state == "succeeded"
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["preempted", "succeeded"]


def test_growing_and_shrinking(bench: Bench) -> None:
    """Restarts are said to cost nothing, for growing has to be worth it in a training of seconds."""
    bench.client.policy_set({"restart_s": 0})
    sleep = {"command": "sleep 600"}
    other = bench.client.submit({"name": "other", "resources": {"gpus": 2}, "run": sleep}).id
    bench.at_work(other)
    resources = {"replicas": 2, "gpus_per_replica": 1, "elastic": {"min_replicas": 1, "max_replicas": 4}}
    job = bench.submit("elastic", resources=resources)
    assert bench.at_step(job, 10).replicas == 2
    bench.client.cancel(other)
    assert bench.at_step(job, 25, attempt=2).replicas == 4
    late = bench.client.submit({"name": "late", "resources": {"gpus": 2}, "run": sleep, "priority": "high"}).id
    bench.at_work(late)
    bench.ends_as_undisturbed(job)
    bench.client.cancel(late)
    attempts = bench.client.attempts(job)
    assert [(each.outcome, each.replicas) for each in attempts] == [("resized", 2), ("resized", 4), ("succeeded", 2)]


def test_a_lost_node(bench: Bench) -> None:
    job = bench.submit("orphan", resources={"replicas": 1, "gpus_per_replica": 2}, restart="eager")
    (place,) = bench.at_step(job, 15).placements
    bench.raylet(place.node).kill()
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["node_lost", "succeeded"]
