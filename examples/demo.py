"""What `make demo` runs once Phalanx is up: submit the language model with the CLI, follow it to its end, and check it.

Exits non-zero if the job did not succeed or its loss did not fall.
"""

import subprocess
import sys
from pathlib import Path

import phalanx

JOB = Path(__file__).parent / "lm" / "job.yaml"


def main() -> int:
    submitted = subprocess.run([sys.executable, "-m", "phalanx", "submit", str(JOB), "--follow"])
    if submitted.returncode != 0:
        return submitted.returncode
    with phalanx.Client() as client:
        job = next(iter(client.jobs(name="byte-lm")))
        (loss,) = client.metrics(job.id, names=["loss"])
    first, last = loss.points[0].mean, loss.points[-1].mean
    if job.state != "succeeded" or not last < first:
        print(f"the demo failed: {job.id} {job.state}, loss {first:.3f} -> {last:.3f}", file=sys.stderr)
        return 1
    print("\nPhalanx stops now. To look further, bring it back with all that it holds, and sign in as it says:")
    print("  . .venv/bin/activate && phalanx up --data .phalanx/demo --nodes 2 --gpus-per-node 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
