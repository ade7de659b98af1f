"""Trainings of the `lm` recipe on a real cluster of two nodes with two GPUs each, and what disturbs them.

Owns the job and the disturbances, which the tests of recovery and `benchmarks/recovery.py` share. What has to come of
one is theirs.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import phalanx
import psutil

PATIENCE_S = 180.0
SLEEP = {"command": "sleep 600"}
HANG = {"hang": {"action": "restart", "factor": 5, "at_least": "3s"}}
CORRUPTION = {"corruption": {"action": "restart", "every": 5}}


def text(words: int = 60_000) -> str:
    """Something to learn: a few hundred words, each followed by few others."""
    dice = random.Random(7)
    vocabulary = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 8))) for _ in range(300)]
    follows = {word: dice.choices(vocabulary, k=4) for word in vocabulary}
    said = [vocabulary[0]]
    for _ in range(words):
        said.append(dice.choice(follows[said[-1]]))
    return " ".join(said)


@dataclass(frozen=True)
class Disturbed:
    """A job that was disturbed: at this Unix time, and in this attempt."""

    job: str
    at: float
    attempt: int = 1


class Cluster:
    """A running Phalanx, with one text and one configuration; `up_pid`: its `phalanx up`."""

    def __init__(self, client: phalanx.Client, directory: Path, up_pid: int, *, steps: int) -> None:
        self.client, self.directory, self.up_pid, self.steps = client, directory, up_pid, steps
        directory.chmod(0o755)  # ranks may run as other users
        (directory / "text.txt").write_text(text())

    def args(self) -> dict[str, Any]:
        return {
            "data": {"paths": [str(self.directory / "text.txt")], "seq_len": 64},
            "model": {"layers": 2, "width": 64, "heads": 4},
            "train": {"steps": self.steps, "global_batch": 12, "seed": 3},
            "optim": {"lr": 3e-3},
            "checkpoint": {"every_steps": 10},
        }

    def submit(self, name: str, *, resources: dict[str, Any] | None = None, **more: Any) -> str:
        run = {"recipe": "lm", "args": self.args()}
        given = {"name": name, "resources": resources or {"replicas": 2, "gpus_per_replica": 2}, "run": run}
        return self.client.submit(given | {"retries": {"max": 3, "backoff": 0}} | more).id

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


def pid_of(attempt: Any, rank: int) -> int:
    return next(each.pid for each in attempt.ranks if each.rank == rank)


def crash(cluster: Cluster) -> Disturbed:
    """A rank is killed."""
    job = cluster.submit("crash")
    os.kill(pid_of(cluster.at_step(job, 15), 3), signal.SIGKILL)
    return Disturbed(job, time.time())


def hang(cluster: Cluster) -> Disturbed:
    """A rank stands still."""
    job = cluster.submit("hang", health=HANG)
    os.kill(pid_of(cluster.at_step(job, 15), 2), signal.SIGSTOP)
    return Disturbed(job, time.time())


def preempt(cluster: Cluster) -> Disturbed:
    """A job of higher priority wants two of its four GPUs, for a moment."""
    job = cluster.submit("victim", priority="low")
    cluster.at_step(job, 15)
    at = time.time()
    run = {"command": "true"}
    above = cluster.client.submit({"name": "above", "resources": {"gpus": 2}, "run": run, "priority": "high"}).id
    assert cluster.client.wait(above, timeout_s=PATIENCE_S).state == "succeeded"
    return Disturbed(job, at)


def grow(cluster: Cluster) -> Disturbed:
    """Two GPUs become free, and the job takes them. Restarts are said to cost nothing: growing has to be worth it in
    a training of seconds."""
    cluster.client.policy_set({"restart_s": 0})
    other = cluster.client.submit({"name": "other", "resources": {"gpus": 2}, "run": SLEEP}).id
    cluster.at_work(other)
    resources = {"replicas": 2, "gpus_per_replica": 1, "elastic": {"min_replicas": 1, "max_replicas": 4}}
    job = cluster.submit("elastic", resources=resources)
    assert cluster.at_step(job, 10).replicas == 2
    at = time.time()
    cluster.client.cancel(other)
    return Disturbed(job, at)


def shrink(cluster: Cluster, job: str) -> tuple[Disturbed, str]:
    """The job that grew has to give two GPUs to another one, which runs until it is cancelled: that one's id, too."""
    assert cluster.at_step(job, 25, attempt=2).replicas == 4
    at = time.time()
    late = {"name": "late", "resources": {"gpus": 2}, "run": SLEEP, "priority": "high"}
    return Disturbed(job, at, attempt=2), cluster.client.submit(late).id


def lose_node(cluster: Cluster) -> Disturbed:
    """Of the job's only node, Ray's process dies."""
    job = cluster.submit("orphan", resources={"replicas": 1, "gpus_per_replica": 2}, restart="eager")
    (place,) = cluster.at_step(job, 15).placements
    cluster.raylet(place.node).kill()
    return Disturbed(job, time.time())
