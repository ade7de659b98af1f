"""Why a job waits, in words: whatever the figures are."""

from datetime import UTC, datetime

import pytest
from phalanx_server.domain.reason import Backoff, Carbon, InMaintenance, NotBefore

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
