"""Owns what a metric may be: its name, its value, and how many of them.

Refuses to know where values come from and what is done with those that are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAME_MAX_CHARS = 128
NAMES_PER_POINT = 100
NAMES_PER_JOB = 2_000
STEP_MAX = (1 << 63) - 1
RANK_MAX = 1 << 20
# Sums of values up to here, and means of values from there on, stay within a float8, in which PostgreSQL computes them.
VALUE_MAX = 1e100
VALUE_MIN = 1e-300

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_./:@%+()\[\] -]{{0,{NAME_MAX_CHARS - 1}}}")
_SHOWN_CHARS = 60


@dataclass(slots=True)
class Checked:
    """`values` that may be stored, and for each name that was refused a sentence that says why."""

    values: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def check_values(values: Mapping[str, float | str]) -> Checked:
    """Sort out what one rank reported together: a value too small for a float8's means is zero. Names that are refused
    are shortened to what can be shown."""
    out = Checked()
    for number, (name, value) in enumerate(values.items()):
        if number >= NAMES_PER_POINT:
            out.refused["…"] = (
                f"A report held {len(values)} metrics; those after the first {NAMES_PER_POINT} are dropped."
            )
            break
        shown = name[:_SHOWN_CHARS]
        if not _NAME.fullmatch(name):
            out.refused[shown] = (
                f"The metric name {shown!r} is dropped: a name has 1 to {NAME_MAX_CHARS} characters,"
                " letters, digits and _./:@%+()[]- or space."
            )
        elif isinstance(value, str) or not math.isfinite(value):
            out.refused[shown] = (
                f"The metric {shown} was {_as_text(value)}; values that are not finite numbers are dropped."
            )
        elif abs(value) > VALUE_MAX:
            out.refused[shown] = f"The metric {shown} was {value:.3g}; values beyond {VALUE_MAX:g} are dropped."
        else:
            out.values[name] = value if abs(value) >= VALUE_MIN else 0.0
    return out


def over_limit(name: str) -> str:
    """Why a name is refused that a job has no room for."""
    return f"The metric {name[:_SHOWN_CHARS]} is dropped: a job may have {NAMES_PER_JOB} different names."


def _as_text(value: float | str) -> str:
    return {"nan": "NaN", "inf": "infinite", "-inf": "minus infinite"}.get(str(value), "not a number")


def clean_step(step: int | None) -> int | None:
    """A step as it can be stored; None where it is out of range."""
    return step if step is not None and -STEP_MAX <= step <= STEP_MAX else None
