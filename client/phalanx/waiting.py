"""Waiting for the end of something that the server knows: looks at it, ever more rarely, until it has ended.

It owns the pauses and what an outage of the server means (nothing: work goes on without it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from phalanx.calls import Call, Now, Pause, Steps
from phalanx.errors import ConnectionFailed, Unavailable, WaitTimeout
from phalanx.retry import OUTAGE_TOLERANCE_S

FIRST_POLL_S, LAST_POLL_S = 0.1, 2.0


class Ending(Protocol):
    """What can be waited for."""

    @property
    def ended(self) -> bool: ...

    @property
    def doing(self) -> str: ...


E = TypeVar("E", bound=Ending)


def until_ended(
    look: Callable[[], Call[E]], name: str, *, timeout_s: float | None, told: Callable[[E], object] = lambda _: None
) -> Steps[E]:
    """Look until it has ended, and answer it. WaitTimeout after `timeout_s` seconds. A server that is away is waited
    for too, OUTAGE_TOLERANCE_S at most."""
    pause_s = FIRST_POLL_S
    began_s = heard_s = yield Now()
    while True:
        try:
            found: E = yield look()
            told(found)
            if found.ended:
                return found
            said, heard_s = found.doing, (yield Now())
        except (ConnectionFailed, Unavailable):
            if (yield Now()) - heard_s > OUTAGE_TOLERANCE_S:
                raise
            said = "out of reach, with its server,"
        if timeout_s is not None and (yield Now()) - began_s >= timeout_s:
            raise WaitTimeout(f"{name} is still {said}", timeout_s)
        yield Pause(pause_s)
        pause_s = min(LAST_POLL_S, pause_s * 1.5)
