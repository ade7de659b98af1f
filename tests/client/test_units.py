"""Durations as people read them."""

from __future__ import annotations

import math

import pytest
from phalanx.units import duration_text, parse_duration

SAID = {
    0.2314: "0.231 s",
    1: "1 s",
    2.54: "2.5 s",
    42.4: "42 s",
    59.7: "1 min",
    423: "7 min 03 s",
    601: "10 min 01 s",
    3600: "1 h",
    10800: "3 h",
    18720: "5 h 12 min",
    86400: "1 d",
    273600: "3 d 4 h",
}


@pytest.mark.parametrize("seconds", SAID)
def test_a_duration_has_its_two_largest_units(seconds: float) -> None:
    assert duration_text(seconds) == SAID[seconds]


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, 1e300, -5.0, 0.0])
def test_any_number_has_words(seconds: float) -> None:
    assert duration_text(seconds)


@pytest.mark.parametrize("seconds", [1, 600, 3600, 10800, 86400])
def test_what_is_said_can_be_written(seconds: float) -> None:
    assert parse_duration(duration_text(seconds).replace("min", "m")) == seconds
