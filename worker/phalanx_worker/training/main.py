"""`python -m phalanx_worker.training.main RECIPE [JSON] [KEY=VALUE …]`, once per rank, in torchrun's environment.

    torchrun --nproc-per-node 2 -m phalanx_worker.training.main lm '{"data": {"paths": ["text/*.txt"]}}' model.layers=6

Owns the outermost part of a training: read the arguments, join the gang, train, say that it is finished. A mistake in
the arguments is one line and exit code 2, from each rank alike.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import phalanx
import torch
from phalanx.recipes.parse import RecipeError, parse

from phalanx_worker.runtime import process_groups, script
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.loop import Facts, Trainer, Watcher, train
from phalanx_worker.training.mesh import make_world, own_device, process_group
from phalanx_worker.training.metrics.memory import MemoryReport

RECIPES = ("lm", "vision", "recsys")
USAGE = f"usage: python -m phalanx_worker.training.main {{{','.join(RECIPES)}}} [JSON] [KEY=VALUE ...]"


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 after the last step or when asked to stop, and what was to be saved then is; 2 for arguments
    that cannot be used. Raises CheckpointError where the state cannot be restored or, at the end, saved."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("phalanx").setLevel(logging.INFO)  # what all ranks do is said once
    try:
        return run(arguments)
    except (RecipeError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"phalanx: {error}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str], *, watchers: Callable[[Trainer], Sequence[Watcher]] = lambda _: ()) -> int:
    """Train the recipe that the arguments describe; `watchers` gives those that look on after the recipe's own. Raises
    RecipeError."""
    recipe, config = read(arguments)
    device = own_device(config.device)
    with process_group(device, offload=config.parallel.offload) as world_size:
        config = config.placed(world_size)
        memory = MemoryReport(device, config)
        trainer = recipe.make(config, make_world(config.parallel, device))
        trainer.watchers = [*trainer.watchers, memory, *watchers(trainer)]
        facts = train(trainer)  # raises unless the last step is saved, so that what is finished is there
        if facts:
            memory.tell(facts.step)
        over = facts is None or facts.step == config.train.steps
        if over and not (trainer.evaluation and trainer.evaluation.interrupted):
            phalanx.finished()
        if int(os.environ.get("RANK", "0")) == 0:
            print(_summary(facts), flush=True)
        del trainer  # before its process groups
    return 0


def read(arguments: Sequence[str]) -> tuple[Any, Any]:
    """The recipe's module and its configuration. Raises RecipeError."""
    if not arguments or arguments[0] not in RECIPES:
        raise RecipeError("", USAGE)
    name, *rest = arguments
    given: Any = {}
    if rest and rest[0].startswith("{"):
        given = _mapping(rest.pop(0))
    recipe = importlib.import_module(f"phalanx_worker.training.recipes.{name}")
    return recipe, parse(recipe.CONFIG, given, rest)


def _mapping(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError("", f"the arguments are not JSON: {error}") from None


def _summary(facts: Facts | None) -> str:
    return f"step {facts.step}: loss {facts.loss:.4f}" if facts else "nothing was left to do"


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it and fp32 is what is computed in
    process_groups.install()  # Phalanx has done so, a plain torchrun has not
    script.exit_as_python(lambda: sys.exit(main(sys.argv[1:])))
