"""What the `lm` recipe costs beside a plain script: steps per second, and how long it takes to the first one.

    python benchmarks/lm_steps.py [--quick] [--rounds 2] [--steps 120] [--cold 3]

The same training of 2 ranks, one thread each, in three ways: the recipe under Phalanx (with the monitor, health checks
and reports; no checkpoint before its end), the recipe under torchrun (what is Phalanx's library and not its service),
and `plain_lm.py` under torchrun. They take turns, A B C C B A; that all come to the same loss at every step is checked.
Speed is taken over the steps after the first fifth, as rank 0 stamps them, and a ratio within a half of a round. The
start runs from the POST (or torchrun's start) until the last rank's first step is done. Budget: a ratio of at least
0.99 for the recipe under Phalanx. The idle rest of Phalanx runs beside all three.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import phalanx
import stamps
from first_step import COLD
from report import Report, arguments

RANKS = 2
SEQ_LEN, BATCH, SYMBOLS = 64, 8, 256
BUDGET = 0.99
RATIO_COLUMNS = ["", "n", "median", "min–max"]
LOSS_TOLERANCE = 1e-4  # relative: sums in another order differ in their last bits


@dataclass(frozen=True)
class Run:
    """One training: seconds to the first step, steps per second, and the global loss of each step."""

    start_s: float
    steps_per_s: float
    losses: list[float]


@dataclass(frozen=True)
class Ways:
    """The three ways to run a training, on data in one directory."""

    client: phalanx.Client
    directory: Path
    steps: int

    def phalanx(self, *, steps: int | None = None, env: dict[str, str] | None = None) -> Run:
        with self._stamps() as here:
            arguments = shlex.join([str(here), "lm", self._config(steps)])
            script = measure.HERE / "stamped_recipe.py"
            posted, _, _ = measure.run_job(self.client, replicas=1, arguments=arguments, env=env, script=script)
            return self._run(posted, here, steps, attempt=1)

    def recipe(self) -> Run:
        return self._torchrun("stamped_recipe.py", "lm")

    def plain(self) -> Run:
        return self._torchrun("plain_lm.py")

    def _torchrun(self, script: str, *words: str) -> Run:
        with self._stamps() as here:
            arguments = shlex.join([str(here), *words, self._config(None)])
            began, output = measure.run_torchrun(arguments, ranks=RANKS, script=measure.HERE / script)
            try:
                return self._run(began, here, None, attempt=0)
            except RuntimeError as error:
                raise RuntimeError(f"{error}:\n{output}") from None

    def _run(self, began: float, here: Path, steps: int | None, *, attempt: int) -> Run:
        ranks = [stamps.read(here, attempt=attempt, rank=rank) for rank in range(RANKS)]
        if any(len(each) != (steps or self.steps) for each in ranks):
            raise RuntimeError(f"expected {steps or self.steps} steps, got {[len(each) for each in ranks]}")
        losses = [statistics.mean(step.loss for step in one) for one in zip(*ranks, strict=True)]
        return Run(max(each[0].at for each in ranks) - began, steps_per_s(ranks[0]), losses)

    def _config(self, steps: int | None) -> str:
        return json.dumps(
            {
                "data": {
                    "format": "tokens",
                    "paths": [str(self.directory / "tokens.bin")],
                    "vocab_size": SYMBOLS,
                    "seq_len": SEQ_LEN,
                    "shuffle": False,
                },
                "model": {"vocabulary": SYMBOLS, "layers": 4, "width": 256, "heads": 4},
                "train": {"steps": steps or self.steps, "global_batch": BATCH, "seed": 1},
                "optim": {"lr": 1e-3, "schedule": {"shape": "constant"}},
                "checkpoint": {"every_steps": 0},
                "device": "cpu",
            }
        )

    @contextmanager
    def _stamps(self) -> Iterator[Path]:
        """A directory for the stamps of one run, for ranks that run as other users."""
        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            Path(name).chmod(0o777)
            yield Path(name)


def steps_per_s(steps: Sequence[stamps.Step]) -> float:
    """Over those after the first fifth."""
    timed = steps[len(steps) // 5 :]
    return (len(timed) - 1) / (timed[-1].at - timed[0].at) if len(timed) > 1 else math.nan


def write_tokens(path: Path, count: int) -> None:
    """A walk on a ring, which can be learned: the loss moves."""
    walk = np.random.default_rng(1).integers(0, 4, count).cumsum() % SYMBOLS
    path.write_bytes(walk.astype("<u2").tobytes())


def demand_same_work(runs: Sequence[Run]) -> None:
    """Raises AssertionError where two runs differ in the loss of a step."""
    for other in runs[1:]:
        for step, (a, b) in enumerate(zip(runs[0].losses, other.losses, strict=True), 1):
            assert math.isclose(a, b, rel_tol=LOSS_TOLERANCE), f"the losses of step {step} differ: {a} and {b}"


def measure_ways(ways: Sequence[Callable[[], Run]], rounds: int) -> list[list[Run]]:
    """The runs of each way, which take turns in one order and then in the other."""
    runs: list[list[Run]] = [[] for _ in ways]
    order = [*range(len(ways)), *reversed(range(len(ways)))]
    for way in itertools.chain.from_iterable(itertools.repeat(order, rounds)):
        runs[way].append(ways[way]())
    return runs


def show(args: argparse.Namespace, runs: list[list[Run]], cold: list[Run]) -> None:
    under_phalanx, recipe, plain = runs
    speed = Report(f"steps of the lm recipe, {RANKS} ranks", "steps/s", higher_is_better=True)
    start = Report("start to first step of the lm recipe", "ms", higher_is_better=False)
    names = ("Phalanx", "the recipe under torchrun", "plain script under torchrun")
    for name, each in zip(names, runs, strict=True):
        speed.ours(name, [run.steps_per_s for run in each])
    warm = start.ours("Phalanx, warm", [1e3 * run.start_s for run in under_phalanx])
    start.ours("Phalanx, cold", [1e3 * run.start_s for run in cold])
    for name, each in zip(names[1:], runs[1:], strict=True):
        start.peer(name, [1e3 * run.start_s for run in each], warm)
    last = under_phalanx[0].losses
    speed.remarks.append(f"the same loss in all: {last[0]:.4f} at step 1, {last[-1]:.4f} at step {args.steps}")
    speed.show()
    ratios = [ratio_row(name, each, plain) for name, each in zip(names, (under_phalanx, recipe), strict=False)]
    measure.show(f"of the plain script's speed beside it (budget: ≥ {BUDGET} for Phalanx)", RATIO_COLUMNS, ratios)
    start.show()


def ratio_row(name: str, ours: list[Run], plain: list[Run]) -> list[str]:
    ratios = [mine.steps_per_s / theirs.steps_per_s for mine, theirs in zip(ours, plain, strict=True)]
    return [name, str(len(ratios)), f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}–{max(ratios):.3f}"]


def main() -> None:
    args = arguments(__doc__, rounds=2, steps=120, cold=3)
    if args.quick:
        args.rounds, args.steps, args.cold = 1, min(args.steps, 30), 1
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as name, phalanx.Client() as client:
        Path(name).chmod(0o755)
        ways = Ways(client, Path(name), args.steps)
        write_tokens(Path(name) / "tokens.bin", args.steps * BATCH * SEQ_LEN + 1)
        ways.phalanx(steps=1)  # what is done once on a node
        runs = measure_ways([ways.phalanx, ways.recipe, ways.plain], args.rounds)
        cold = [ways.phalanx(steps=1, env=COLD) for _ in range(args.cold)]
    demand_same_work([run for each in runs for run in each])
    show(args, runs, cold)


if __name__ == "__main__":
    measure.inside(main, nodes=1)
