"""Submit → first optimizer step, 2 nodes × 2 ranks: warm, cold, and plain torchrun of the same script.

    python benchmarks/first_step.py [--warm N] [--cold N]

The clock runs from the client's POST (or torchrun's start) to the moment the last rank has done its first step, as that
rank itself saw it. Budget: p50 under 250 ms, warm, on CPU.
"""

import argparse

import measure
import phalanx

PHASES = ["accepted_s", "queued_s", "placed_s", "ranks_started_s", "rendezvous_s", "first_step_s"]
# A variable that matters at import keeps the runner from forking: the rank starts cold.
COLD = {"PYTHONHASHSEED": "0"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=30)
    parser.add_argument("--cold", type=int, default=5)
    return parser.parse_args()


def jobs(client: phalanx.Client, count: int, env: dict[str, str]) -> tuple[list[float], list[dict]]:
    """Submit → first step of `count` jobs one after another, in seconds, and their phases."""
    totals, phases = [], []
    for _ in range(count):
        posted, job, output = measure.run_job(client, replicas=2, arguments="--steps 1", env=env)
        totals.append(max(measure.expect(measure.numbers("first_step", output), 4, output)) - posted)
        phases.append(job.phases)
    return totals, phases


def torchrun(count: int) -> list[float]:
    totals = []
    for _ in range(count):
        began, output = measure.run_torchrun("--steps 1", ranks=4)
        totals.append(max(measure.expect(measure.numbers("first_step", output), 4, output)) - began)
    return totals


def row(name: str, totals: list[float], baseline_s: float) -> list[str]:
    p50, p95 = (measure.percentile(totals, share) for share in (0.5, 0.95))
    spread = f"{min(totals) * 1e3:,.0f}–{max(totals) * 1e3:,.0f}"
    return [name, str(len(totals)), f"{p50 * 1e3:,.0f}", f"{p95 * 1e3:,.0f}", spread, f"{p50 / baseline_s:.3f}"]


def main() -> None:
    args = arguments()
    with phalanx.Client() as client:
        jobs(client, 2, {})
        warm, phases = jobs(client, args.warm, {})
        cold, _ = jobs(client, args.cold, COLD)
    plain = torchrun(args.cold)
    baseline_s = measure.percentile(plain, 0.5)
    measure.show(
        "submit → first optimizer step, 2 nodes × 2 ranks (ms)",
        ["", "runs", "p50", "p95", "min–max", "p50 / torchrun"],
        [
            row("Phalanx, warm", warm, baseline_s),
            row("Phalanx, cold", cold, baseline_s),
            row("torchrun, one node × 4", plain, baseline_s),
        ],
    )
    measure.show(
        "phases of the warm runs (ms)",
        ["phase", "p50", "p95"],
        [
            [name, *(f"{measure.percentile([getattr(p, name) for p in phases], q) * 1e3:,.1f}" for q in (0.5, 0.95))]
            for name in PHASES
        ],
    )


if __name__ == "__main__":
    measure.inside(main)
