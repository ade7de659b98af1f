"""What keeps a draining node from being empty: why a job is still there, and until when at the latest.

Owns the reasons and the sentences that are told of them. Refuses to know whether there is room elsewhere: the pass
moves whoever it can at once, so who may move and is still there has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from phalanx_server.domain.attempt import AttemptState


class Why(StrEnum):
    """`stopping` is on its way · `lost` is not confirmed gone · `min_runtime` and then `no_room` would move ·
    `not_preemptible` stays."""

    STOPPING = "stopping"
    LOST = "lost"
    NOT_PREEMPTIBLE = "not_preemptible"
    MIN_RUNTIME = "min_runtime"
    NO_ROOM = "no_room"


@dataclass(frozen=True, slots=True)
class Occupant:
    """A job's attempt on the node. `ends_by`: when it has to be over, by what earlier attempts left of its time limit
    or the grace of its stop; None: nothing says so, as of one that is lost."""

    state: str
    preemptible: bool
    protected_until: datetime
    ends_by: datetime | None

    def why(self, now: datetime) -> Why:
        if self.state == AttemptState.STOPPING:
            return Why.STOPPING
        if self.state == AttemptState.LOST:
            return Why.LOST
        if not self.preemptible:
            return Why.NOT_PREEMPTIBLE
        return Why.MIN_RUNTIME if now < self.protected_until else Why.NO_ROOM


_SAID = {
    Why.STOPPING: ("stops", "stop"),
    Why.LOST: ("is lost, and not confirmed gone", "are lost, and not confirmed gone"),
    Why.NOT_PREEMPTIBLE: ("is not preemptible and runs on", "are not preemptible and run on"),
    Why.MIN_RUNTIME: (
        "moves after its minimum run time, given room elsewhere",
        "move after their minimum run time, given room elsewhere",
    ),
    Why.NO_ROOM: ("moves once there is room elsewhere", "move once there is room elsewhere"),
}
_GOES_BY_ITSELF = frozenset({Why.STOPPING, Why.LOST})


def outlook(occupants: Sequence[Occupant], now: datetime) -> str:
    """What is to be expected of the node, in sentences."""
    if not occupants:
        return "Nothing is left there."
    said = [_of_those(why, [each for each in occupants if each.why(now) is why]) for why in Why]
    endless = [each for each in occupants if each.ends_by is None and each.why(now) not in _GOES_BY_ITSELF]
    if endless:
        said.append("It may not empty by itself: `phalanx requeue` or `phalanx cancel` what has no time limit.")
    return " ".join(filter(None, said))


def _of_those(why: Why, occupants: Sequence[Occupant]) -> str:
    if not occupants:
        return ""
    one, many = _SAID[why]
    sentence = f"1 job {one}" if len(occupants) == 1 else f"{len(occupants)} jobs {many}"
    ends = [each.ends_by for each in occupants if each.ends_by is not None]
    if len(ends) == len(occupants):
        return f"{sentence}, until {max(ends):%Y-%m-%dT%H:%M:%SZ} at the latest."
    endless = len(occupants) - len(ends)
    if why in _GOES_BY_ITSELF:
        return f"{sentence}."
    return f"{sentence}, without a time limit." if not ends else f"{sentence}, {endless} without a time limit."
