"""Health on a real Ray cluster: a gang that hangs is seen, its stacks are kept on every node, and it goes on from its
checkpoint; what a rank found itself ends the job; nodes are looked at before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import phalanx
import pytest

pytestmark = pytest.mark.slow
PATIENCE_S = 120.0
TRAIN = """
import os, threading, time
import phalanx, torch, torch.distributed as dist
from phalanx import job
dist.init_process_group("gloo")
rank, first = dist.get_rank(), os.environ["PHALANX_ATTEMPT"] == "1"
done = int((os.environ.get("PHALANX_RESUME_FROM") or "0").rpartition("-")[2])
def wait_for_ever():
    threading.Event().wait()
for step in range(done + 1, 41):
    dist.all_reduce(torch.ones(1))
    time.sleep(0.02)
    phalanx.report(step=step, loss=1 / step)
    if step == 20 and rank == 0:
        phalanx.checkpoint("step-20", step=20)
    if step == 30 and first and rank == 1 and os.environ["FAULT"] == "hang":
        wait_for_ever()
    if step == 30 and rank == 1 and os.environ["FAULT"] == "nan":
        job.mark("health", check="nan", action="stop", message="the loss of step 30 is NaN", blamed=1)
        raise SystemExit(1)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def client(make_up: Callable[..., AbstractContextManager[Any]]) -> Iterator[phalanx.Client]:
    with make_up(nodes=2, gpus_per_node=1) as up, up.client() as client:
        yield client


def submit(client: phalanx.Client, directory: Path, fault: str, **more: Any) -> str:
    directory.chmod(0o755)
    (directory / "train.py").write_text(TRAIN)
    run = {"command": "python train.py", "workdir": str(directory), "env": {"FAULT": fault}}
    return client.submit({"name": fault, "resources": {"gpus": 2}, "run": run, **more}).id


def test_a_gang_that_hangs_goes_on_from_its_checkpoint(client: phalanx.Client, tmp_path: Path) -> None:
    hang = {"action": "restart", "factor": 3, "at_least": "3s"}
    job = submit(client, tmp_path, "hang", health={"hang": hang}, retries={"max": 1, "backoff": 0})
    done = client.wait(job, timeout_s=PATIENCE_S)
    assert (done.state, done.attempts, done.failures) == ("succeeded", 2, 1)
    hung, again = client.attempts(job)
    assert hung.outcome == "hung" and "took no step for " in (hung.message or "")
    assert again.resume_from is not None and again.resume_from.endswith("step-20")
    told = [event.message for event in client.events(job) if event.kind == "health"]
    assert told and "the stacks of 1 of its 1 ranks here are in stacks/" in told[0]
    stacks = {output.path.rpartition("/")[2] for output in client.outputs(job) if output.path.startswith("stacks/")}
    assert stacks == {"rank-0.txt", "rank-1.txt"}
    goodput = client.goodput(job)
    assert goodput.goodput is not None and 0 < goodput.goodput < 1
    assert goodput.parts_gpu_s["redone"] > 0, "steps 21 to 30 were taken twice"


def test_what_a_rank_found_ends_the_job_for_good(client: phalanx.Client, tmp_path: Path) -> None:
    job = submit(client, tmp_path, "nan", retries={"max": 3, "backoff": 0})
    done = client.wait(job, timeout_s=PATIENCE_S)
    assert (done.state, done.attempts, done.reason) == ("failed", 1, "unhealthy")
    assert done.message == "rank 1 stopped itself: the loss of step 30 is NaN"


def test_nodes_are_looked_at_before_training_if_the_job_wants_it(client: phalanx.Client, tmp_path: Path) -> None:
    job = submit(client, tmp_path, "none", health={"preflight": {"action": "replace", "factor": 1000}})
    assert client.wait(job, timeout_s=PATIENCE_S).state == "succeeded"
    notes = [event.message for event in client.events(job) if event.kind == "note"]
    assert any(note.startswith("Preflight: 2 ranks on 2 nodes are fit") for note in notes), notes
