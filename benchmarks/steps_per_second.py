"""Training steps/s under Phalanx, metrics on, against plain torchrun of the same script, in pairs A B A B.

    python benchmarks/steps_per_second.py [--pairs N] [--steps N]

Both run 2 ranks on this host, one thread each. Budget: ratio of at least 0.99.
"""

import argparse
import statistics

import measure
import phalanx


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    script = f"--steps {args.steps} --width 512 --batch 64"
    rows, ratios = [], []
    with phalanx.Client() as client:
        for pair in range(1, args.pairs + 1):
            _, _, output = measure.run_job(client, replicas=1, arguments=script)
            (ours,) = measure.expect(measure.numbers("steps_per_s", output), 1, output)
            _, output = measure.run_torchrun(script, ranks=2)
            (plain,) = measure.expect(measure.numbers("steps_per_s", output), 1, output)
            ratios.append(ours / plain)
            rows.append([f"pair {pair}", f"{ours:,.1f}", f"{plain:,.1f}", f"{ours / plain:.3f}"])
    rows.append(["median", "", "", f"{statistics.median(ratios):.3f}"])
    measure.show("training steps/s, 2 ranks", ["", "Phalanx", "torchrun", "ratio"], rows)


if __name__ == "__main__":
    measure.inside(main, nodes=1)
