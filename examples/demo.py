"""What `make demo` runs once Phalanx is up: submit the language model with the CLI, follow it to its end, and check it.

Exits non-zero if the job did not succeed or its loss did not fall.
"""

import math
import subprocess
import sys
from pathlib import Path

import phalanx
from phalanx.models import Point

JOB = Path(__file__).parent / "lm" / "job.yaml"


def main() -> int:
    submitted = subprocess.run([sys.executable, "-m", "phalanx", "submit", str(JOB), "--follow"])
    if submitted.returncode != 0:
        return submitted.returncode
    with phalanx.Client() as client:
        job = next(iter(client.jobs(name="byte-lm")))
        losses = [mean_of(point) for one in client.metrics(job.id, names=["loss"]) for point in one.points]
    first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
    if job.state != "succeeded" or not (last < first and math.isfinite(first - last)):
        print(f"the demo failed: {job.id} {job.state}, loss {first:.3f} -> {last:.3f}", file=sys.stderr)
        return 1
    print("\nPhalanx stops now. To look further, bring it back with all that it holds, and sign in as it says:")
    print("  . .venv/bin/activate && phalanx up --data .phalanx/demo --nodes 2 --gpus-per-node 2")
    return 0


def mean_of(point: Point) -> float:
    """One that is not finite comes as text or as null."""
    return math.nan if point.mean is None else float(point.mean)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # a terminal sends it to `phalanx submit` and `phalanx up` too, and they say what they do
        sys.exit(130)
