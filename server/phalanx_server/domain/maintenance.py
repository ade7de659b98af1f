"""A maintenance window: nodes that are kept empty between two times.

Owns the states of a window and which times make sense. Refuses to know which nodes there are, and what becomes of jobs.
"""

from datetime import datetime
from enum import StrEnum

from phalanx_server.domain.errors import FieldError


class WindowState(StrEnum):
    """Where a window is in its life; it follows from the time alone."""

    PLANNED = "planned"
    OPEN = "open"
    OVER = "over"


def state_at(now: datetime, *, starts_at: datetime, ends_at: datetime) -> WindowState:
    """The state of a window; it is over from `ends_at` on."""
    if ends_at <= now:
        return WindowState.OVER
    return WindowState.OPEN if starts_at <= now else WindowState.PLANNED


def check_times(now: datetime, *, starts_at: datetime, ends_at: datetime) -> list[FieldError]:
    """What is wrong with the times that somebody gives a window. It may have begun, so that it is open at once."""
    if ends_at <= starts_at:
        said = f"{_shown(ends_at)} is not after starts_at, {_shown(starts_at)}"
        return [FieldError("ends_at", said, "give a later end, or an earlier start")]
    if ends_at <= now:
        return [FieldError("ends_at", f"{_shown(ends_at)} has passed", "give an end that is still to come")]
    return []


def _shown(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%SZ}"
