"""A recipe as a job file would run it, with every step stamped (`stamps`): what the training benchmarks launch.

    python stamped_recipe.py STAMPS [--health JSON] [--flip STEP] RECIPE JSON

It runs under Phalanx and under torchrun. With `--flip` a bit of the last rank's first parameter is flipped after that
step of the first attempt.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from phalanx.recipes.health import VARIABLE
from phalanx_worker.training.loop import Trainer
from phalanx_worker.training.main import run
from stamps import Stamps

EXPONENT_BIT = 1 << 29


class Flip:
    """A watcher that corrupts one replica."""

    def __init__(self, parameter: torch.Tensor, step: int) -> None:
        self.parameter, self.step = parameter, step

    def after_backward(self, *_: Any) -> bool:
        return True

    @torch.no_grad()
    def after_step(self, facts: Any) -> None:
        if facts.step == self.step:
            self.parameter.view(torch.int32).view(-1)[0] ^= EXPONENT_BIT


def watchers(options: argparse.Namespace, trainer: Trainer) -> Sequence[Any]:
    """The stamps first: a corrupted step has been taken."""
    first, last = os.environ.get("PHALANX_ATTEMPT") == "1", int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
    flips = [Flip(next(trainer.layout.parameters()), options.flip)] if options.flip and first and last else []
    return [Stamps(options.stamps), *flips]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", help="a directory that ranks may write to")
    parser.add_argument("--health")
    parser.add_argument("--flip", type=int)
    parser.add_argument("recipe", nargs=2)
    options = parser.parse_args()
    if options.health:
        os.environ[VARIABLE] = options.health
    run(options.recipe, watchers=partial(watchers, options))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # with torch 2.13 a rank now and then aborts in the interpreter's finalization
