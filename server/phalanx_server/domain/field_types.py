"""The types of a job file's fields: durations, sizes, names, and what is not built yet.

Owns how each is written and the largest value. Knows no key.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from phalanx_server.domain.units import parse_duration, parse_size

DURATION_MAX_S = 10 * 365 * 86400.0
MEMORY_MAX_BYTES = 1 << 50


def _not_supported(given: object) -> None:
    """Takes absence only. A later version that builds the part replaces this by a model."""
    if given not in (None, [], {}):
        raise PydanticCustomError(
            "unsupported", "is not supported by this version of Phalanx", {"hint": "leave it out"}
        )


def _number_as_text(given: object) -> object:
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


_DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "examples": ["30s", "4h"]}]}
_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["64GiB"]}]}
Duration = Annotated[
    float, BeforeValidator(parse_duration), Field(ge=0, le=DURATION_MAX_S), WithJsonSchema(_DURATION_SCHEMA)
]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=MEMORY_MAX_BYTES), WithJsonSchema(_SIZE_SCHEMA)]
Whole = Annotated[int, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, BeforeValidator(_number_as_text)]
Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Unsupported = Annotated[None, BeforeValidator(_not_supported)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
