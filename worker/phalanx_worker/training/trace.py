"""Reads a trace of torch.profiler: how long a rank communicated, and how much of that it computed meanwhile.

    python -m phalanx_worker.training.trace traces/prof_…-rank-0.json.gz

Takes Chrome's format, plain or compressed, as `phalanx profile` fetches it. Owns what counts as communication and what
as computing. On a GPU both are kernels: NCCL's, and all others. On a CPU they are gloo's ranges, and ATen's operators
on other threads than gloo's: Python in between counts as neither, so that what is hidden is rather more than is said.
Standard library only.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]  # begin and end, in microseconds as in the trace

COLLECTIVES = ("c10d::", "_c10d_functional::")  # operators that hand a collective over, or wait for it
FIELDS = {"name", "tid", "ts", "dur"}
GZIP = b"\x1f\x8b"
NO_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Overlap:
    """Seconds of one rank's trace, each moment counted once: `compute_s` computes, `communication_s` communicates
    (waiting for other ranks within a collective included), and `hidden_s` of the latter does both. `steps` were
    recorded, as far as the trace says."""

    steps: int
    compute_s: float
    communication_s: float
    hidden_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that nothing was computed under."""
        return self.communication_s - self.hidden_s

    @property
    def hidden_share(self) -> float:
        """Of the communication; 0 where there was none."""
        return self.hidden_s / self.communication_s if self.communication_s else 0.0


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that have a length. Raises OSError, and ValueError where it is no trace."""
    content = path.read_bytes()
    try:
        told = json.loads(gzip.decompress(content) if content.startswith(GZIP) else content)
        return [event for event in told["traceEvents"] if event.get("ph") == "X" and event.keys() >= FIELDS]
    except (*NO_GZIP, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no trace in Chrome's format; give a file that `phalanx profile` wrote") from error


def overlap(events: Sequence[dict[str, Any]]) -> Overlap:
    """What a rank's events come to."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    communication, computing = _of_gpu(kernels) if kernels else _of_cpu(events)
    return Overlap(
        steps=len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")}),
        compute_s=_seconds(computing),
        communication_s=_seconds(communication),
        hidden_s=_seconds(common(communication, computing)),
    )


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals apart from each other, in order."""
    apart: list[Interval] = []
    for begin, end in sorted(intervals):
        if apart and begin <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((begin, end))
    return apart


def common(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The moments that are in both; each is `merged`."""
    found: list[Interval] = []
    i = j = 0
    while i < len(some) and j < len(others):
        begin, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if begin < end:
            found.append((begin, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The moments of the first that are not in the second; each is `merged`."""
    edges = [float("-inf"), *(edge for interval in others for edge in interval), float("inf")]
    return common(some, list(zip(edges[::2], edges[1::2], strict=True)))


def _of_gpu(kernels: Sequence[dict[str, Any]]) -> tuple[list[Interval], list[Interval]]:
    exchanges = [event for event in kernels if "nccl" in event["name"].lower()]
    others = [event for event in kernels if "nccl" not in event["name"].lower()]
    return _moments(exchanges), _moments(others)


def _of_cpu(events: Sequence[dict[str, Any]]) -> tuple[list[Interval], list[Interval]]:
    """A collective may be waited for within an operator, of a DTensor say: that is no computing."""
    exchanges = [event for event in events if event["name"].startswith("gloo:")]
    threads = {event["tid"] for event in exchanges}
    operators = [event for event in events if event.get("cat") == "cpu_op" and event["tid"] not in threads]
    computing = [event for event in operators if event["name"].startswith("aten::")]
    waiting = [event for event in operators if event["name"].startswith(COLLECTIVES)]
    return _moments(exchanges), without(_moments(computing), _moments(waiting))


def _moments(events: Iterable[dict[str, Any]]) -> list[Interval]:
    return merged((event["ts"], event["ts"] + event["dur"]) for event in events)


def _seconds(apart: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in apart) / 1e6


def main(paths: Sequence[str]) -> int:
    """Say of each trace what it comes to. The exit code: 2 where one cannot be read."""
    if not paths:
        print("usage: python -m phalanx_worker.training.trace TRACE [TRACE ...]", file=sys.stderr)
        return 2
    for path in paths:
        try:
            print(f"{path}: {in_words(overlap(read(Path(path))))}")
        except (OSError, ValueError) as error:
            print(f"phalanx: {error}", file=sys.stderr)
            return 2
    return 0


def in_words(seen: Overlap) -> str:
    """One line."""
    said = f"{seen.steps} steps, computing {seen.compute_s:.3g} s, communication {seen.communication_s:.3g} s"
    return (
        f"{said}: {seen.hidden_s:.3g} s of it under computing ({seen.hidden_share:.0%}), {seen.exposed_s:.3g} s exposed"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
