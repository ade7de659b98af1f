"""What keeps a draining node from being empty, in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from phalanx_server.domain.draining import Occupant, Why, outlook

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def occupant(state: str = "running", *, preemptible: bool = True, protected_s: float = 0, ends_s: float | None = None):
    ends_by = None if ends_s is None else NOW + timedelta(seconds=ends_s)
    return Occupant(state, preemptible, NOW + timedelta(seconds=protected_s), ends_by)


REASONS = {
    "a job that stops is on its way, whatever it is": (
        occupant("stopping", preemptible=False, protected_s=60, ends_s=30),
        Why.STOPPING,
    ),
    "a lost one is not confirmed gone": (occupant("lost", preemptible=False), Why.LOST),
    "one that is not preemptible stays": (occupant(preemptible=False, protected_s=60), Why.NOT_PREEMPTIBLE),
    "one that is protected moves later": (occupant(protected_s=1), Why.MIN_RUNTIME),
    "any other would have moved": (occupant("starting"), Why.NO_ROOM),
}

OUTLOOKS = {
    "an empty node": ([], "Nothing is left there."),
    "one that ends, at the latest": (
        [occupant(preemptible=False, ends_s=3600)],
        "1 job is not preemptible and runs on, until 2026-11-21T13:00:00Z at the latest.",
    ),
    "several that end: the last of them": (
        [occupant(ends_s=60), occupant(ends_s=3600)],
        "2 jobs move once there is room elsewhere, until 2026-11-21T13:00:00Z at the latest.",
    ),
    "some that nothing ends": (
        [occupant(preemptible=False), occupant(preemptible=False, ends_s=60), occupant("stopping", ends_s=30)],
        "1 job stops, until 2026-11-21T12:00:30Z at the latest. 2 jobs are not preemptible and run on, 1 without a time"
        " limit. It may not empty by itself: `phalanx requeue` or `phalanx cancel` what has no time limit.",
    ),
    "what is lost goes by itself": ([occupant("lost")], "1 job is lost, and not confirmed gone."),
    "none that ends": (
        [occupant(protected_s=1)],
        "1 job moves after its minimum run time, given room elsewhere, without a time limit. It may not empty by"
        " itself: `phalanx requeue` or `phalanx cancel` what has no time limit.",
    ),
}


@pytest.mark.parametrize("sentence", REASONS)
def test_why_a_job_is_still_there(sentence: str) -> None:
    there, why = REASONS[sentence]
    assert there.why(NOW) is why


@pytest.mark.parametrize("sentence", OUTLOOKS)
def test_what_is_to_be_expected(sentence: str) -> None:
    there, said = OUTLOOKS[sentence]
    assert outlook(there, NOW) == said
