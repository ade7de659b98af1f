"""Why a job waits, in words: whatever the figures are."""

from datetime import UTC, datetime

import pytest
from phalanx_server.domain.reason import (
    Backoff,
    Carbon,
    Explanation,
    InMaintenance,
    NotBefore,
    Reserved,
    WaitsForVictims,
)

LAST = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("at", [LAST, 1e18, float("inf"), float("nan")])
def test_a_time_that_no_date_can_say_is_said_as_the_last_that_can(at: float) -> None:
    whys = [NotBefore(at, at), Backoff(at, at), Carbon(at, at), InMaintenance(at, None)]
    for why in whys:
        assert "9999-12-31" in why.message() and "9999-12-31" in why.unblocks()[0]


@pytest.mark.parametrize(
    ("at", "said"), [(0.0, "1970-01-01T00:00:00Z"), (-5.0, "1969-12-31T23:59:55Z"), (4e9, "2096-10-02T07:06:40Z")]
)
def test_other_times_are_said_as_they_are(at: float, said: str) -> None:
    assert NotBefore(at, at).unblocks() == (f"it is {said}",)


def test_nor_does_a_time_before_all_dates_fail() -> None:
    assert NotBefore(float("-inf"), 0).message()


@pytest.mark.parametrize(
    ("why", "message", "unblocks"),
    [
        (
            WaitsForVictims(("a1", "b1", "b2"), 0.0),
            "waits for a1 and 2 jobs of other tenants to stop",
            ("a1 stops", "2 jobs of other tenants stop"),
        ),
        (
            WaitsForVictims(("b1",), 0.0),
            "waits for 1 job of another tenant to stop",
            ("1 job of another tenant stops",),
        ),
        (
            Reserved(("a1", "a2", "b1")),
            "what it needs is kept for a1, a2 and 1 job of another tenant",
            (
                "a1 starts and leaves enough",
                "a2 starts and leaves enough",
                "1 job of another tenant starts and leaves enough",
            ),
        ),
        (
            Reserved(("b1", "b2")),
            "what it needs is kept for 2 jobs of other tenants",
            ("one of 2 jobs of other tenants starts and leaves enough",),
        ),
        (Reserved(("a1",)), "what it needs is kept for a1", ("a1 starts and leaves enough",)),
    ],
)
def test_jobs_that_a_reader_may_not_know_of_are_counted(why: Explanation, message: str, unblocks: tuple[str]) -> None:
    hiding = why.hiding(lambda job: job.startswith("b"))
    assert (hiding.message(), hiding.unblocks()) == (message, unblocks)
    assert why.hiding(lambda job: False) == why
