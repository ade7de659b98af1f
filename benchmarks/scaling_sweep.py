"""A real sweep of the `lm` recipe, the law that `phalanx scaling fit` finds in it, and how well it foretells two runs.

    python benchmarks/scaling_sweep.py [--quick]

A grid of model sizes and token counts is trained on the source code of Python's standard library, as bytes, each run
with its own schedule, its final loss that of held-out data. Two larger runs, in size, tokens or both, are left out of
the fit: what counts is how far their loss is from the forecast, and whether its 90 % interval holds it. The peer is to
say that they end as the best run of the grid did.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass

import measure
import phalanx

SEQ_LEN, BATCH = 128, 8
STEP_TOKENS = SEQ_LEN * BATCH


@dataclass(frozen=True)
class Shape:
    """One run: the width of a model of two layers, and for how many steps it is trained."""

    width: int
    steps: int

    @property
    def name(self) -> str:
        return f"w{self.width}-s{self.steps}"


GRID = [Shape(width, steps) for width in (16, 32, 64, 96) for steps in (64, 256, 768)]
LARGER = [Shape(96, 1536), Shape(128, 1024)]
QUICK = [Shape(width, steps) for width in (8, 16, 32) for steps in (16, 64, 256)]
QUICK_LARGER = [Shape(64, 256)]


def job(shape: Shape, label: str) -> dict:
    args = {
        "data": {"format": "text", "paths": [f"{sysconfig.get_path('stdlib')}/*.py"], "seq_len": SEQ_LEN},
        "model": {"layers": 2, "width": shape.width, "heads": shape.width // 8},
        "train": {"steps": shape.steps, "global_batch": BATCH, "report_every": 10},
        "optim": {"lr": 4e-3 * (32 / shape.width) ** 0.5, "schedule": {"warmup": shape.steps // 10}},
        "evaluate": {"every": shape.steps, "share": 0.02, "batch": 64},
        "checkpoint": {"every_steps": 0},
    }
    run = {"recipe": "lm", "args": args}
    return {"name": shape.name, "resources": {"gpus": 1, "cpus_per_gpu": 1}, "labels": {"sweep": label}, "run": run}


def train(client: phalanx.Client, shapes: list[Shape], label: str) -> None:
    # The longest first, so that none is left alone at the end.
    shapes = sorted(shapes, key=lambda shape: -shape.width * shape.steps)
    for submitted in client.submit_many([job(shape, label) for shape in shapes]):
        ended = client.wait(submitted.id)
        if ended.state != "succeeded":
            raise RuntimeError(f"{ended.id} {ended.state}: {ended.message}")


def fit(*words: str) -> dict:
    argv = [sys.executable, "-m", "phalanx", "scaling", "fit", "--loss-metric", "held_out_loss", "--json", *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def ended(client: phalanx.Client, label: str) -> list[dict]:
    """Parameters, tokens and final loss of the runs of a label."""
    runs = []
    for each in client.jobs(labels={"sweep": label}):
        last = {series.name: series.points[-1].max for series in client.metrics(each.id)}
        runs.append({"name": each.name, **{n: last[n] for n in ("parameters", "tokens_total", "held_out_loss")}})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    grid, larger = (QUICK, QUICK_LARGER) if args.quick else (GRID, LARGER)
    with phalanx.Client() as client:
        train(client, grid, "grid")
        train(client, larger, "larger")
        law = fit("--label", "sweep=grid")
        best = min(run["loss"] for run in law["runs"])
        rows = [[run["name"], f"{run['loss']:.3f}", f"{run['fitted_loss']:.3f}", "", ""] for run in law["runs"]]
        for run in ended(client, "larger"):
            asked = ("--parameters", str(run["parameters"]), "--tokens", str(run["tokens_total"]))
            said, loss = fit("--label", "sweep=grid", *asked)["forecast"]["loss"], run["held_out_loss"]
            interval = f"{said['low']:.3f}–{said['high']:.3f}"
            rows.append([f"{run['name']}, foretold", f"{loss:.3f}", f"{said['value']:.3f}", interval, f"{best:.3f}"])
    measure.show(
        f"lm, 2 layers, {STEP_TOKENS} tokens a step: held-out loss (nats per byte)",
        ["run", "measured", "law", "90 % interval", "best of the grid"],
        rows,
    )
    for name, number in law["law"].items():
        print(f"{name} = {number['value']:.4g} ({number['low']:.4g}–{number['high']:.4g})")
    for warning in law["warnings"]:
        print(f"doubt: {warning}")


if __name__ == "__main__":
    measure.inside(main, nodes=1, gpus_per_node=2)
