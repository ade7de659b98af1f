"""What the job file says of health means the same to the server and to the ranks of a recipe."""

from __future__ import annotations

import dataclasses
import json

from phalanx.recipes.health import Health as RecipeHealth
from phalanx.recipes.parse import parse
from phalanx_server.domain.health_spec import Health


def test_ranks_know_every_check_of_their_own_with_the_same_defaults() -> None:
    told = json.loads(Health().model_dump_json())
    own = {field.name: told[field.name] for field in dataclasses.fields(RecipeHealth)}
    assert parse(RecipeHealth, own) == RecipeHealth()
    assert dataclasses.asdict(RecipeHealth()) == own
    assert told.keys() - own.keys() == {"hang", "gpu", "preflight"}  # those of the node
