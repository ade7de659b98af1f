"""When each step of a training was over, and with which loss: the file that every rank of a training benchmark writes.

Owns the form of the file: a line `step time loss` a step, Unix time, in `DIRECTORY/ATTEMPT-RANK`. Attempts count from
1; outside of Phalanx it is 0. Knows neither recipes nor torch, so that a plain script can be measured alike.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Step:
    step: int
    at: float
    loss: float


class Stamps:
    """This rank's file. Also a watcher of the training loop, which asks it to refuse nothing."""

    def __init__(self, directory: str) -> None:
        name = f"{os.environ.get('PHALANX_ATTEMPT', '0')}-{os.environ.get('RANK', '0')}"
        self._file = (Path(directory) / name).open("w", buffering=1)  # line by line: the process may be killed

    def stamp(self, step: int, loss: float) -> None:
        self._file.write(f"{step} {time.time()!r} {loss!r}\n")

    def after_backward(self, *_: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        self.stamp(facts.step, facts.loss)


def read(directory: Path, *, attempt: int = 0, rank: int = 0) -> list[Step]:
    """What that rank has written so far; nothing before its first step."""
    path = directory / f"{attempt}-{rank}"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [Step(int(step), float(at), float(loss)) for step, at, loss in map(str.split, whole)]
