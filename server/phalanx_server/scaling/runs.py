"""A finished training as the law sees it, and how runs are read from a CSV or JSON file. It owns which values a run
needs; it refuses to know the service (`history`).
"""

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phalanx_server.scaling.fit import Sample
from phalanx_server.scaling.law import FLOPS_PER_PARAMETER_TOKEN

REQUIRED = ("parameters", "tokens", "loss")
NUMBERS = (*REQUIRED, "flops", "tokens_per_s", "gpus")
SHORT = {"n": "parameters", "d": "tokens", "l": "loss", "c": "flops", "run": "name", "id": "name", "job": "name"}
"""What the literature calls them, and what else a run's name may stand under."""


@dataclass(frozen=True)
class Run:
    """One finished training. `flops` is what it took in all, 6 N D unless it was given; `tokens_per_s` is of all its
    GPUs together, `gpus` how many those were; 0 where unknown."""

    name: str
    parameters: float
    tokens: float
    loss: float
    flops: float
    tokens_per_s: float = 0.0
    gpus: float = 0.0
    gpu_type: str = ""

    @property
    def flops_per_s_per_gpu(self) -> float | None:
        """What each GPU achieved; None where it was not measured."""
        if not (self.tokens_per_s and self.gpus):
            return None
        return self.flops / self.tokens * self.tokens_per_s / self.gpus


@dataclass(frozen=True)
class LeftOut:
    """A run that the fit cannot use, and why."""

    name: str
    reason: str


Runs = tuple[list[Run], list[LeftOut]]


def sample_of(runs: Iterable[Run]) -> Sample:
    """The three vectors of the fit."""
    runs = list(runs)
    return Sample(*(np.array([getattr(run, name) for run in runs], dtype=float) for name in REQUIRED))


def flops_per_parameter_token(runs: Iterable[Run]) -> float:
    """k in C = k N D: the median of the runs, 6 unless their compute was given."""
    return float(np.median([run.flops / (run.parameters * run.tokens) for run in runs]))


def sorted_out(found: Iterable[Run | LeftOut]) -> Runs:
    """The runs to use, and those that are not."""
    found = list(found)
    return [one for one in found if isinstance(one, Run)], [one for one in found if isinstance(one, LeftOut)]


def make_run(name: str, values: Mapping[str, Any]) -> Run | LeftOut:
    """A run of the values that it has: numbers, their text, or None. Left out where one of the three is missing."""
    missing = [key for key in REQUIRED if values.get(key) in (None, "")]
    if missing:
        return LeftOut(name, f"it has no {' and no '.join(missing)}")
    numbers = {key: _number(values.get(key)) for key in NUMBERS}
    for key in REQUIRED:
        if not (math.isfinite(numbers[key]) and numbers[key] > 0):
            return LeftOut(name, f"its {key} is {values[key]}: it must be a number over 0")
    optional = {key: number if math.isfinite(number) else 0.0 for key, number in numbers.items()}
    product = numbers["parameters"] * numbers["tokens"]
    optional["flops"] = optional["flops"] or FLOPS_PER_PARAMETER_TOKEN * product
    return Run(name=name, gpu_type=str(values.get("gpu_type") or ""), **optional)


def _number(value: Any) -> float:
    """0 where there is none, NaN where it is something else."""
    try:
        return 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        return math.nan


# ------------------------------------------------------------------ files


def read_runs(path: Path) -> Runs:
    """The runs of a file: CSV with a header, or JSON: a list of objects, or an object with such a list as `runs` (what
    `phalanx scaling fit --json` prints). OSError where it cannot be read, ValueError where it holds something else."""
    text = path.read_text(encoding="utf-8-sig")
    rows = _json_rows(text) if text.lstrip()[:1] in ("[", "{") else _csv_rows(text)
    if not rows:
        raise ValueError("it has no runs")
    return sorted_out(make_run(_name(row, number), row) for number, row in enumerate(rows, 1))


def _json_rows(text: str) -> list[dict[str, Any]]:
    document = json.loads(text)
    rows = document.get("runs") if isinstance(document, dict) else document
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, each with parameters, tokens and loss")
    return [{_key(key): value for key, value in row.items()} for row in rows]


def _csv_rows(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    columns = [_key(column) for column in reader.fieldnames or ()]
    for wanted in REQUIRED:
        if wanted not in columns:
            near = difflib.get_close_matches(wanted, columns, n=1)
            raise ValueError(f"it has no column {wanted!r}; " + _instead(near, columns))
    return [{_key(key): value for key, value in row.items() if key} for row in reader]


def _instead(near: list[str], columns: list[str]) -> str:
    return f"is it {near[0]!r}?" if near else f"it has {', '.join(columns) or 'no header'}"


def _key(column: str) -> str:
    word = column.strip().lower()
    return SHORT.get(word, word)


def _name(row: Mapping[str, Any], number: int) -> str:
    return str(row.get("name") or f"run {number}")
