"""Which recipes there are, and whether arguments make one that a gang can run.

Owns the names. Standard library only, so that a job file is checked by the same code in the CLI, the server and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.recipes.lm import LmConfig
from phalanx.recipes.parse import RecipeError, parse
from phalanx.recipes.recsys import RecsysConfig
from phalanx.recipes.vision import VisionConfig

Config = LmConfig | VisionConfig | RecsysConfig

CONFIGS: Mapping[str, type[Config]] = {"lm": LmConfig, "vision": VisionConfig, "recsys": RecsysConfig}
"""By the name in the job file, `run: {recipe: NAME}`."""

MODULE = "phalanx_worker.training.main"
"""What each rank runs, `python -m MODULE NAME JSON`."""


def read(recipe: str, args: Mapping[str, Any]) -> Config:
    """The configuration that the arguments make. Raises RecipeError."""
    return parse(CONFIGS[recipe], args)


def check(recipe: str, args: Mapping[str, Any], world_sizes: range) -> Config:
    """The same, and that gangs of all these sizes can run it: an elastic job has several. Raises RecipeError."""
    config = read(recipe, args)
    for world_size in world_sizes:
        try:
            config.placed(world_size)
        except RecipeError as error:
            problem = error.problem if len(world_sizes) == 1 else f"{error.problem} (with {world_size} ranks)"
            raise RecipeError(error.field, problem) from None
    return config
