"""Jobs for the tests of this folder, on one Phalanx: each lasts until it is told to end, and writes down what it does.

`train.py` counts steps, saves when it is asked to stop, and goes on from there. Both scripts note in one file, in the
order in which it happened, when they begin and end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phalanx

PATIENCE_S = 60.0

NOTES = """
import os, time, phalanx

def note(what):
    with open(os.environ["TRACE"], "a") as trace:
        trace.write(what + os.environ["NAME"] + os.environ.get("PHALANX_ARRAY_INDEX", "") + "\\n")

def told():
    return os.path.exists(os.environ["DONE"] + os.environ.get("PHALANX_ARRAY_INDEX", ""))
"""
WAIT = """
from notes import *
note("+")
while not phalanx.should_stop() and not told():
    time.sleep(0.02)
note("-")
raise SystemExit(int(os.environ["EXIT"]) if told() else 1)
"""
TRAIN = """
from notes import *
step = int((os.environ.get("PHALANX_RESUME_FROM") or "0").rpartition("-")[2])
print("from", step, flush=True)
while not phalanx.should_stop() and not told():
    step += 1
    phalanx.report(step=step)
    time.sleep(0.02)
if os.environ["RANK"] == "0":
    phalanx.checkpoint(f"step-{step}", step=step)
print("until", step, flush=True)
"""


def wait_for(what: Callable[[], Any], why: str) -> Any:
    """What it gives once that is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline_s, f"{why}: not within {PATIENCE_S:g} s"
        time.sleep(0.05)
    return found


class SmallJobs:
    """Submitted through `up`, a running Phalanx; `directory` is theirs."""

    def __init__(self, up: Any, client: phalanx.Client, directory: Path) -> None:
        self.up, self.client = up, client
        self.code, self.marks = directory / "code", directory / "marks"
        self.trace = self.marks / "trace"
        for each in (directory, self.code, self.marks):
            each.mkdir(exist_ok=True)
            each.chmod(0o777)
        self.trace.touch()
        self.trace.chmod(0o666)
        for name, text in (("notes.py", NOTES), ("wait.py", WAIT), ("train.py", TRAIN)):
            (self.code / name).write_text(text)

    def document(self, name: str, script: str, *, ends_with: int = 0, **more: Any) -> dict[str, Any]:
        env = {"NAME": name, "TRACE": str(self.trace), "DONE": str(self.marks / f"{name}."), "EXIT": str(ends_with)}
        run = {"command": f"python {script}.py", "workdir": str(self.code), "env": env}
        return {"name": name, "resources": {"gpus": 1}, "run": run, **more}

    def submit(self, name: str, script: str = "wait", **more: Any) -> str:
        return self.client.submit(self.document(name, script, **more)).id

    def let_end(self, name: str, *indices: int) -> None:
        """The job may end, or these jobs of the array may."""
        for index in indices or ("",):
            (self.marks / f"{name}.{index}").touch()

    def end(self, name: str, job: str) -> Any:
        self.let_end(name)
        return self.client.wait(job, timeout_s=PATIENCE_S)

    def noted(self) -> list[str]:
        """`+name` and `-name`, with the index of a job of an array, in the order in which they began and ended."""
        return self.trace.read_text().split()

    def running(self, job: str, attempt: int = 1) -> Any:
        """That attempt of the job, once it has reported a step or, where it reports none, runs."""

        def reached() -> Any:
            found = self.client.job(job)
            assert not found.ended, (found.state, found.message, self.client.logs(job, rank=0))
            trains = "train.py" in found.spec["run"]["command"]
            is_there = found.state == "running" and found.attempts == attempt
            return found.attempt if is_there and (found.progress is not None or not trains) else None

        return wait_for(reached, f"attempt {attempt} of {job} runs")

    def waits_for(self, job: str, reason: str) -> Any:
        """The hold of the job, once it says that reason."""

        def told() -> Any:
            found = self.client.job(job)
            assert found.state == "queued", (found.state, found.message)
            return found.hold if found.hold and found.hold.reason == reason else None

        return wait_for(told, f"{job} is held ({reason})")
