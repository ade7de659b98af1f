"""The types of the fields of a job file and of other documents: durations, sizes, times, names, labels, and what is not
built yet.

Owns how each is written and the largest value. Knows no key.
"""

from datetime import UTC, datetime
from typing import Annotated

from phalanx.units import parse_duration, parse_size
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

DURATION_MAX_S = 10 * 365 * 86400.0
MEMORY_MAX_BYTES = 1 << 50
LABELS_MAX = 64
# Far from the last date that there is, whose arithmetic ends in errors.
TIME_YEAR_MAX = 9_000


def _not_supported(given: object) -> None:
    """Takes absence only. A later version that builds the part replaces this by a model."""
    if given not in (None, [], {}):
        raise PydanticCustomError(
            "unsupported", "is not supported by this version of Phalanx", {"hint": "leave it out"}
        )


def _number_as_text(given: object) -> object:
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


def _time_text(given: object) -> object:
    if given is not None and not isinstance(given, str | datetime):
        raise ValueError("expected a time like 2026-11-21T00:00:00Z")
    return given


def _in_utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError("has no time zone: end it with Z or an offset like +01:00")
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        at = datetime.max
    if at.year > TIME_YEAR_MAX:
        raise ValueError(f"is not within the years 1 to {TIME_YEAR_MAX} in UTC")
    return at


def _few_and_short(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > LABELS_MAX:
        raise ValueError(f"{len(labels)} labels, at most {LABELS_MAX}")
    for key, value in labels.items():
        if not 1 <= len(key) <= 128 or len(value) > 256 or "=" in key:
            raise ValueError(
                f"{key[:80]!r}: a label has a key of 1 to 128 characters without '=', a value of up to 256"
            )
    return labels


_DURATION_SCHEMA = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "examples": ["30s", "4h"]}]}
_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["64GiB"]}]}
Duration = Annotated[
    float, BeforeValidator(parse_duration), Field(ge=0, le=DURATION_MAX_S), WithJsonSchema(_DURATION_SCHEMA)
]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=MEMORY_MAX_BYTES), WithJsonSchema(_SIZE_SCHEMA)]
Whole = Annotated[int, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, BeforeValidator(_number_as_text)]
Labels = Annotated[dict[str, Text], AfterValidator(_few_and_short)]
Moment = Annotated[datetime, BeforeValidator(_time_text), AfterValidator(_in_utc)]
Name = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Unsupported = Annotated[None, BeforeValidator(_not_supported)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
