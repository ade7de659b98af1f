"""Job arrays: one job file that stands for many jobs, each with an index.

Owns how indices are written and the bounds. Knows no job.
"""

import re
from functools import lru_cache
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from phalanx_server.domain.field_types import Part, Whole

ARRAY_MAX_JOBS = 10_000
INDEX_MAX = 999_999_999
INDICES_MAX_CHARS = 16_384

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?")


def parse_indices(text: str) -> tuple[int, ...]:
    """`0-99`, `0,3,7-9`, `0-20:5`: the indices, in order. ValueError says what is wrong."""
    if len(text) > INDICES_MAX_CHARS:
        raise ValueError(f"is {len(text)} characters long, at most {INDICES_MAX_CHARS}; write ranges, like 0-99")
    seen: set[int] = set()
    for part in text.split(","):
        wanted = _range(part.strip())
        if len(seen) + len(wanted) > ARRAY_MAX_JOBS:
            raise ValueError(f"names more than {ARRAY_MAX_JOBS} jobs: split it into several arrays")
        twice = seen.intersection(wanted)
        if twice:
            raise ValueError(f"names {min(twice)} twice")
        seen.update(wanted)
    return tuple(sorted(seen))


def _range(part: str) -> range:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise ValueError(f"{part[:40]!r} is no index and no range of them: write 0-99, 0,3,7-9 or 0-20:5")
    first = int(match[1])
    last, step = int(match[2] or first), int(match[3] or 1)
    if last < first or step == 0:
        raise ValueError(f"{part!r} names no index: a range goes up, by at least 1")
    return range(first, last + 1, step)


@lru_cache(maxsize=1024)
def size_of(indices: str) -> int:
    """How many jobs an array of these indices, which were checked, has."""
    return len(parse_indices(indices))


def _number_as_text(given: object) -> object:
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


class Array(Part):
    """So many jobs of one submit; at most `max_running` of them run at once (absent = as many as fit)."""

    indices: Annotated[str, BeforeValidator(_number_as_text), Field(examples=["0-99", "0,3,7-9", "0-20:5"])]
    max_running: Annotated[Whole, Field(ge=1, le=ARRAY_MAX_JOBS)] | None = None

    @field_validator("indices")
    @classmethod
    def _are_indices(cls, indices: str) -> str:
        parse_indices(indices)
        return indices.replace(" ", "")
