"""A training of the `lm` recipe that is disturbed ends as one that is not: the same loss after the same steps, whatever
happened to it. On a real Ray cluster of two nodes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import disturbed
import pytest
from disturbed import PATIENCE_S, Cluster

pytestmark = pytest.mark.slow
STEPS, EVERY = 60, 10  # the cluster's jobs keep each tenth step, and are disturbed later
TOLERANCE = 2e-4  # of the final loss: sums over another number of ranks differ in their last bits


FLIP = """
import os, sys
os.environ["PHALANX_HEALTH"] = sys.argv[2]
import torch
from phalanx_worker.training import loop, main
take_step = loop._step
def step_and_flip(trainer, step, *rest, **more):
    result = take_step(trainer, step, *rest, **more)
    if step == 17 and os.environ["RANK"] == "3" and os.environ["PHALANX_ATTEMPT"] == "1":
        with torch.no_grad():
            next(iter(trainer.layout.parameters())).view(torch.int32).view(-1)[0] ^= 1 << 29
    return result
loop._step = step_and_flip
sys.exit(main.main(["lm", sys.argv[1]]))
"""


class Bench(Cluster):
    """A cluster, and the loss at which an undisturbed training ends."""

    undisturbed = float("nan")

    def loss(self, job: str) -> float:
        """At its last step."""
        done = self.client.wait(job, timeout_s=PATIENCE_S)
        assert done.state == "succeeded", (done.message, self.client.logs(job, rank=0))
        assert done.progress is not None and done.progress.step == STEPS
        (series,) = self.client.metrics(job, names=["loss"])
        last = series.points[-1]
        assert last.step == STEPS and last.mean is not None
        return float(last.mean)

    def ends_as_undisturbed(self, job: str) -> None:
        """After it has gone on from a checkpoint: a training that began anew would end at the same loss."""
        assert self.loss(job) == pytest.approx(self.undisturbed, rel=TOLERANCE)
        for attempt in self.client.attempts(job)[1:]:
            said = self.client.logs(job, rank=0, attempt=attempt.number)
            (step,) = re.findall(r"^resumed from \S+, step (\d+)$", said, re.MULTILINE)
            assert int(step) >= EVERY, said


@pytest.fixture(scope="module")
def bench(make_up: Callable[..., AbstractContextManager[Any]], tmp_path_factory: Any) -> Iterator[Bench]:
    with make_up(nodes=2, gpus_per_node=2) as up, up.client() as client:
        bench = Bench(client, tmp_path_factory.mktemp("text"), up.process.pid, steps=STEPS)
        bench.undisturbed = bench.loss(bench.submit("undisturbed"))
        yield bench


def test_a_rank_that_crashes(bench: Bench) -> None:
    job = disturbed.crash(bench).job
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["failed", "succeeded"]


def test_a_rank_that_hangs(bench: Bench) -> None:
    job = disturbed.hang(bench).job
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["hung", "succeeded"]


def test_a_flipped_bit(bench: Bench) -> None:
    """In a parameter of one replica, in its first attempt, by a script that runs the recipe as a job file would."""
    script = bench.directory / "flip.py"
    script.write_text(FLIP)
    words = [f"python {script}", *(shlex.quote(json.dumps(given)) for given in (bench.args(), disturbed.CORRUPTION))]
    job = bench.submit("flip", run={"command": " ".join(words)})
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["unhealthy", "succeeded"]
    told = [event.message for event in bench.client.events(job) if event.kind == "health"]
    assert any("rank 3" in message for message in told), told


def test_a_preemption(bench: Bench) -> None:
    job = disturbed.preempt(bench).job
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["preempted", "succeeded"]


def test_growing_and_shrinking(bench: Bench) -> None:
    job = disturbed.grow(bench).job
    _, late = disturbed.shrink(bench, job)
    bench.at_work(late)
    bench.ends_as_undisturbed(job)
    bench.client.cancel(late)
    attempts = bench.client.attempts(job)
    assert [(each.outcome, each.replicas) for each in attempts] == [("resized", 2), ("resized", 4), ("succeeded", 2)]


def test_a_lost_node(bench: Bench) -> None:
    job = disturbed.lose_node(bench).job
    bench.ends_as_undisturbed(job)
    assert bench.outcomes(job) == ["node_lost", "succeeded"]
