"""The job file's say on the size of a gang and on how close together it runs: `resources.elastic` and `.topology`.

Owns these keys and what they say about each other. Which levels there are is the policy's, not known here.
"""

import re
from typing import Annotated

from pydantic import Field, model_validator

from phalanx_server.domain.field_types import Part, Whole

LEVEL_NODE = "node"
_LEVEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?$"


def is_level(name: str) -> bool:
    """Whether a level may have that name: it is the key of a node's label."""
    return re.fullmatch(_LEVEL_PATTERN, name) is not None


Level = Annotated[str, Field(pattern=_LEVEL_PATTERN)]


class Elastic(Part):
    """How few replicas do, and how many it can use. `replicas` is only the preferred start."""

    min_replicas: Annotated[Whole, Field(ge=1)]
    max_replicas: Annotated[Whole, Field(ge=1)]

    @model_validator(mode="after")
    def _is_range(self) -> "Elastic":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}")
        return self


class Slice(Part):
    """Each `replicas` of the gang stay together within one domain of `level`."""

    level: Level
    replicas: Annotated[Whole, Field(ge=1)]


class Topology(Part):
    """The level of the cluster within which the gang must (`required`) or should (`preferred`) stay."""

    required: Level | None = None
    preferred: Level | None = None
    slice: Slice | None = None

    @model_validator(mode="after")
    def _says_one(self) -> "Topology":
        if (self.required is None) == (self.preferred is None):
            raise ValueError("say one of required and preferred")
        return self

    def levels(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """The levels that it names, each with the path of its field."""
        named = ((("required",), self.required), (("preferred",), self.preferred))
        inner = ((("slice", "level"), self.slice.level),) if self.slice else ()
        return (*((path, level) for path, level in named if level is not None), *inner)
