"""Time lost per recovery: what disturbs a training of the `lm` recipe, and how long until it makes new steps.

    python benchmarks/recovery.py [--quick] [--runs 3] [--only crash hang …]

On a real Phalanx of two nodes with two GPUs each, by the jobs of `tests/e2e/disturbed.py`. The clock runs from the
fault (a rank is killed or stopped, a bit is flipped, Ray's process of a node is killed; the submit or the cancel that
makes the scheduler preempt, grow or shrink) until rank 0 has done a step beyond the last one that the disturbed attempt
had done, as that rank stamps it. In between, in seconds:

    detect      until the attempt is asked to stop, or has ended by itself
    stop        until its end is confirmed
    queue       until its next attempt is given GPUs
    start       until all ranks run
    rendezvous  until their process group is up
    setup       until the first step is done, which is that after the checkpoint
    redone      steps that had been done before, and the first one that had not

From `start` on these are the parts of `phalanx goodput`. `no step` is how long there was no new step: training goes on
while the scheduler decides, and after a bit flipped until the replicas are compared, every 5 steps. Checkpoints are
made every 10 steps (of some 30 ms), so at most as many are redone.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import stamps

sys.path.append(str(measure.HERE.parent / "tests" / "e2e"))
import disturbed  # of the end-to-end tests
from disturbed import PATIENCE_S, Cluster, Disturbed

PARTS = ("detect", "stop", "queue", "start", "rendezvous", "setup", "redone")
KINDS = ("crash", "hang", "corruption", "preemption", "growing", "shrinking", "lost node")
STEPS = 100_000  # nothing ends by itself
FLIP_STEP, FLIP_RANK = 17, 3


@dataclass(frozen=True)
class Loss:
    """What one disturbance cost, in seconds. `parts` add up to the time from the fault to the first new step."""

    parts: dict[str, float]
    without_step_s: float

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


class Stamped(Cluster):
    """Its trainings run the recipe by a script that stamps every step."""

    def __init__(self, directory: Path, up: measure.Phalanx) -> None:
        super().__init__(up.client, directory, up.pid, steps=STEPS)
        self._stamps: dict[str, Path] = {}

    def submit(
        self, name: str, *, resources: dict[str, Any] | None = None, options: Sequence[str] = (), **more: Any
    ) -> str:
        here = Path(tempfile.mkdtemp(dir=self.directory))
        here.chmod(0o777)  # ranks may run as other users
        words = ["python", "stamped_recipe.py", str(here), *options, "lm", json.dumps(self.args())]
        given = {
            "name": name,
            "resources": resources or {"replicas": 2, "gpus_per_replica": 2},
            "run": {"command": shlex.join(words)},
            "retries": {"max": 3, "backoff": 0},
        }
        job = self.client.submit(given | more, workdir=measure.HERE).id
        self._stamps[job] = here
        return job

    def stamped(self, job: str, *, attempt: int, rank: int = 0) -> list[stamps.Step]:
        return stamps.read(self._stamps[job], attempt=attempt, rank=rank)

    def end(self, *jobs: str) -> None:
        """Cancel what still runs, and wait until its GPUs are free."""
        for job in jobs:
            self.client.cancel(job)
        for job in jobs:
            self.client.wait(job, timeout_s=PATIENCE_S)


def corrupt(cluster: Stamped) -> Disturbed:
    """A bit of one replica is flipped."""
    options = ["--flip", str(FLIP_STEP), "--health", json.dumps(disturbed.CORRUPTION)]
    job = cluster.submit("flip", options=options)
    cluster.at_step(job, 1, attempt=2)
    flipped = next(step for step in cluster.stamped(job, attempt=1, rank=FLIP_RANK) if step.step == FLIP_STEP)
    return Disturbed(job, flipped.at)


def loss_of(cluster: Stamped, what: Disturbed) -> Loss:
    """Waits for the first new step. Raises RuntimeError where it does not come in the attempt that follows."""
    following = what.attempt + 1
    until = time.monotonic() + PATIENCE_S
    while not (new := _new_steps(cluster, what)):
        if time.monotonic() > until or cluster.client.job(what.job).attempts > following:
            raise RuntimeError(f"{what.job} made no new step in its attempt {following}")
        time.sleep(0.05)
    attempts = {each.number: each for each in cluster.client.attempts(what.job)}
    moments = _moments(what.at, attempts[what.attempt], attempts[following], new[0].at)
    parts = {part: later - earlier for part, (earlier, later) in zip(PARTS, pairwise(moments), strict=True)}
    return Loss(parts, new[0].at - cluster.stamped(what.job, attempt=what.attempt)[-1].at)


def _new_steps(cluster: Stamped, what: Disturbed) -> list[stamps.Step]:
    """Those of the attempt that follows which are beyond what the disturbed one had reached. While there are none, it
    may still be at work."""
    steps = cluster.stamped(what.job, attempt=what.attempt + 1)
    reached = cluster.stamped(what.job, attempt=what.attempt)[-1].step
    return [step for step in steps if step.step > reached]


def _moments(at: float, ended: Any, following: Any, new_at: float) -> list[float]:
    """The ends of the parts, after the fault itself. What was skipped took no time; a lost node's attempt ends, for
    its job, when the next begins."""
    stop_asked = ended.raw["stop_requested_at"]
    asked_at = datetime.fromisoformat(stop_asked) if stop_asked else None
    over_at = min(each for each in (ended.ended_at, following.created_at) if each is not None)
    known: Iterable[datetime | None] = (
        min(each for each in (asked_at, over_at) if each is not None),
        over_at,
        following.created_at,
        following.started_at,
        following.rendezvous_at,
        following.first_step_at,
    )
    moments = [at]
    for moment in (*(each and each.timestamp() for each in known), new_at):
        moments.append(min(max(moment or moments[-1], moments[-1]), new_at))
    return moments


def disturb(cluster: Stamped, kind: str) -> dict[str, Loss]:
    """One disturbance; growing brings shrinking along."""
    simple: dict[str, Callable[[Any], Disturbed]] = {
        "crash": disturbed.crash,
        "hang": disturbed.hang,
        "corruption": corrupt,
        "preemption": disturbed.preempt,
        "lost node": disturbed.lose_node,
    }
    if kind in simple:
        what = simple[kind](cluster)
        loss = loss_of(cluster, what)
        cluster.end(what.job)
        return {kind: loss}
    grown = disturbed.grow(cluster)
    growing = loss_of(cluster, grown)
    shrunk, late = disturbed.shrink(cluster, grown.job)
    shrinking = loss_of(cluster, shrunk)
    cluster.end(grown.job, late)
    return {"growing": growing, "shrinking": shrinking}


def run(kinds: Sequence[str], runs: int, *, nodes: int) -> dict[str, list[Loss]]:
    """Each kind so often, in turns, on one Phalanx."""
    losses: dict[str, list[Loss]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="phalanx-bench-") as name,
        measure.phalanx_up(nodes=nodes, gpus_per_node=2) as up,
    ):
        cluster = Stamped(Path(name), up)
        for kind in [each for _ in range(runs) for each in kinds]:
            for which, loss in disturb(cluster, kind).items():
                losses.setdefault(which, []).append(loss)
    return losses


def row(kind: str, losses: list[Loss]) -> list[str]:
    totals = [loss.total_s for loss in losses]
    spread = f"{min(totals):.2f}–{max(totals):.2f}"
    parts = (statistics.median(loss.parts[part] for loss in losses) for part in PARTS)
    without = statistics.median(loss.without_step_s for loss in losses)
    medians = [f"{value:.2f}" for value in (*parts, without)]
    return [kind, str(len(losses)), f"{statistics.median(totals):.2f}", spread, *medians]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    runs = 1 if args.quick else args.runs
    resized = {"growing", "shrinking"} & set(args.only)
    kinds = [kind for kind in KINDS if kind in args.only and kind not in (*resized, "lost node")]
    losses: dict[str, list[Loss]] = {}
    if kinds or resized:
        losses |= run([*kinds, *(["growing"] if resized else [])], runs, nodes=2)
    if "lost node" in args.only:
        losses |= run(["lost node"], runs, nodes=1 + runs)  # a lost one does not come back
    columns = ["s", "n", "to a new step", "min–max", *PARTS, "no step"]
    measure.show("time lost per recovery, medians", columns, [row(*each) for each in losses.items()])


if __name__ == "__main__":
    main()
