"""The `lm` recipe on the GPUs of this machine: tokens/s, MFU, where a step's time goes, and memory beside the estimate.

    torchrun --nproc-per-node N benchmarks/gpu_lm.py [--layers N] [--width N] [--heads N] [--seq-len N] [--batch N]
        [--steps N] [KEY=VALUE …]

One rank: `python benchmarks/gpu_lm.py`. The defaults are a model of 1.3 billion parameters with 16,384 tokens a step
and rank, which fits an H100; more of the recipe's arguments go after them, such as `precision.compute=fp8
parallel.recompute=selective`. It is the recipe as a job file runs it, on random tokens from a memory-mapped file; what
it reports to Phalanx is caught and its medians printed, without the first third of the steps. Runs on a CPU too, where
only the smallest sizes end.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import measure
import numpy as np
import phalanx
import torch
from phalanx import job
from phalanx_worker.training.data.tokens import write_tokens
from phalanx_worker.training.main import run

VOCABULARY = 32_768
PARTS = ("compute", "comm", "data_wait", "checkpoint", "other")  # means per step, of the median rank
MEMORY = ("memory_peak_bytes", "memory_estimated_bytes")
RATES = {"tokens_per_s": "tokens/s", "mfu": "MFU", "gpu_utilization_median": "GPU utilisation"}
GIB = 1 << 30


class Reports:
    """What the recipe says: the numbers by name, and the steps that they are of."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def take(self, *, step: int, total_steps: int, **values: float) -> None:
        for name, value in values.items():
            self.values[name].append((step, value))

    def after(self, step: int, name: str) -> list[float]:
        return [value for at, value in self.values[name] if at > step]


def arguments(options: argparse.Namespace, tokens: Path) -> list[str]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    args = {
        "model": {"vocabulary": VOCABULARY, **{name: getattr(options, name) for name in ("layers", "width", "heads")}},
        "data": {"format": "tokens", "paths": [str(tokens)], "seq_len": options.seq_len},
        "train": {"steps": options.steps, "global_batch": options.batch * ranks},
        "precision": {"compute": "bf16"},
        "checkpoint": {"every_steps": 0},
    }
    return ["lm", json.dumps(args), *options.more]


def show(reports: Reports, options: argparse.Namespace) -> None:
    first = options.steps // 3
    rows = [[label, *spread(reports.after(first, name), 1.0)] for name, label in RATES.items()]
    rows.append(["step, ms", *spread(reports.after(first, "step_time_median_s"), 1e3)])
    rows += [[f"  {name}, ms", *spread(reports.after(first, f"{name}_median_s"), 1e3)] for name in PARTS]
    rows += [[f"{name.removesuffix('_bytes')}, GiB", *spread(reports.after(0, name)[-1:], 1 / GIB)] for name in MEMORY]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    (_, parameters), *_ = reports.values["parameters"]
    title = (
        f"lm, {parameters / 1e6:,.4g} million parameters, {options.batch} × {options.seq_len} tokens a rank, {device}"
    )
    measure.show(title, ["", "median", "min–max"], [row for row in rows if len(row) > 1])


def spread(values: list[float], scale: float) -> list[str]:
    if not values:
        return []
    scaled = [scale * value for value in values]
    return [f"{statistics.median(scaled):,.4g}", f"{min(scaled):,.4g}–{max(scaled):,.4g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 24, "width": 2048, "heads": 16, "seq-len": 2048, "batch": 8, "steps": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    reports = Reports()
    phalanx.report = reports.take
    job.mark = lambda kind, **data: print(data["message"]) if kind == "note" else None
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory, "random.bin")
        drawn = np.random.default_rng(0).integers(VOCABULARY, size=4 * options.batch * options.seq_len, dtype=np.uint16)
        with tokens.open("wb") as stream:
            write_tokens(stream, [drawn], vocab_size=VOCABULARY)
        run(arguments(options, tokens))
    if os.environ.get("RANK", "0") == "0":
        show(reports, options)


if __name__ == "__main__":
    main()
