"""Jobs that give way, with a real Ray cluster: evicted, moved off a draining node, grown; each goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import phalanx
import pytest

pytestmark = pytest.mark.slow
PATIENCE_S = 60.0
SCRIPT = """
import os, time, phalanx
step = int((os.environ.get("PHALANX_RESUME_FROM") or "0").rpartition("-")[2])
print("world", os.environ["WORLD_SIZE"], "from", step, flush=True)
if os.environ["RANK"] == "0":
    phalanx.checkpoint(f"step-{step + 1}", step=step + 1)
phalanx.report(step=step + 1)
while not phalanx.should_stop() and not os.path.exists(os.environ["DONE"]):
    time.sleep(0.05)
"""


def wait_for(what: Callable[[], Any], why: str) -> Any:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline_s, f"{why}: not within {PATIENCE_S:g} s"
        time.sleep(0.1)
    return found


class Stack:
    """One cluster of two nodes with two GPUs each."""

    def __init__(self, client: phalanx.Client, directory: Path) -> None:
        self.client, self.directory = client, directory
        (directory / "train.py").write_text(SCRIPT)

    def submit(self, name: str, *, resources: dict[str, Any], **more: Any) -> str:
        done = self.directory / f"{name}.done"
        run = {"command": "python train.py", "workdir": str(self.directory), "env": {"DONE": str(done)}}
        return self.client.submit({"name": name, "resources": resources, "run": run, **more}).id

    def finish(self, name: str, job: str) -> Any:
        (self.directory / f"{name}.done").touch()
        return self.client.wait(job, timeout_s=PATIENCE_S)

    def running(self, job: str, number: int) -> Any:
        """That attempt of the job, once it has reported its step."""

        def reached() -> Any:
            found = self.client.job(job)
            assert found.state != "failed", (found.message, self.client.logs(job, rank=0))
            is_there = found.state == "running" and found.attempts == number
            return found.attempt if is_there and (found.progress and found.progress.step) == number else None

        return wait_for(reached, f"attempt {number} of {job} runs")

    def nodes_of(self, attempt: Any) -> set[str]:
        return {place.node for place in attempt.placements}


@pytest.fixture(scope="module")
def stack(make_up: Callable[..., AbstractContextManager[Any]], tmp_path_factory: Any) -> Iterator[Stack]:
    with make_up(nodes=2, gpus_per_node=2) as up, up.client() as client:
        directory = tmp_path_factory.mktemp("job")
        directory.chmod(0o777)
        yield Stack(client, directory)


def test_a_victim_gives_way_and_goes_on_from_its_checkpoint(stack: Stack) -> None:
    low = stack.submit("low", resources={"replicas": 2, "gpus_per_replica": 2}, priority="low")
    stack.running(low, 1)
    big = stack.submit("big", resources={"replicas": 1, "gpus_per_replica": 2}, priority="high")
    stack.running(big, 1)
    first = stack.client.attempts(low)[0]
    assert (first.outcome, first.stop_cause, first.stop_reason, first.stop_for) == (
        "preempted",
        "preemption",
        "within_tenant",
        big,
    )
    told = [event.message for event in stack.client.events(low) if event.kind == "stopping"]
    assert len(told) == 1 and told[0].startswith(f"Gives way to big ({big})"), told
    assert stack.client.job(low).state == "queued", "exit 0 is no success of a job that gave way"
    assert stack.finish("big", big).state == "succeeded"
    again = stack.running(low, 2)
    assert again.resume_from is not None and again.resume_from.endswith("step-1")
    done = stack.finish("low", low)
    assert (done.state, done.failures) == ("succeeded", 0)
    assert "world 4 from 1" in stack.client.logs(low, rank=0, attempt=2)


def test_a_job_moves_off_a_draining_node(stack: Stack) -> None:
    job = stack.submit("moved", resources={"gpus": 1})
    (home,) = stack.nodes_of(stack.running(job, 1))
    stack.client.drain(home)
    try:
        again = stack.running(job, 2)
        assert stack.nodes_of(again).isdisjoint({home}) and again.resume_from.endswith("step-1")
        first = stack.client.attempts(job)[0]
        assert (first.outcome, first.next.placement[0].node) == ("migrated", *stack.nodes_of(again))
    finally:
        stack.client.uncordon(home)
    assert stack.finish("moved", job).state == "succeeded"


def test_an_elastic_job_takes_what_is_idle_and_gives_it_back(stack: Stack) -> None:
    """It starts with what there is, grows when the other job has ended, and shrinks again for the next. A restart is
    said to cost nothing: by now jobs like these are expected to end within seconds, and growing has to be worth it."""
    stack.client.policy_set({"restart_s": 0})
    other = stack.submit("other", resources={"gpus": 2})
    stack.running(other, 1)
    resources = {"replicas": 2, "gpus_per_replica": 1, "elastic": {"min_replicas": 1, "max_replicas": 4}}
    job = stack.submit("elastic", resources=resources)
    assert stack.running(job, 1).replicas == 2
    stack.finish("other", other)
    assert stack.running(job, 2).replicas == 4
    late = stack.submit("late", resources={"gpus": 2})
    stack.running(late, 1)
    assert stack.running(job, 3).replicas == 2
    attempts = stack.client.attempts(job)
    assert [(each.outcome, each.stop_for) for each in attempts[:2]] == [("resized", None), ("resized", late)]
    assert stack.finish("late", late).state == stack.finish("elastic", job).state == "succeeded"
    sizes = [stack.client.logs(job, rank=0, attempt=number).split()[1] for number in (1, 2, 3)]
    assert sizes == ["2", "4", "2"]
