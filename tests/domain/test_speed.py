"""What makes a figure of how fast a job is: sentences on readings, and what they add up to."""

from __future__ import annotations

from itertools import pairwise

import pytest
from phalanx_server.domain.speed import CHANGE, COUNT_MIN, KEEP_S, STEADY_S, Measured, Reading, measure


def reading(at_s: float, step: int | None = None, attempt: str = "a", **values: float) -> Reading:
    return Reading(attempt=attempt, at_s=at_s, step=step, values=values)


def after(*readings: Reading) -> Measured | None:
    known: Measured | None = None
    for each in readings:
        known = measure(known, each)
    return known


def every(seconds: float, until_s: float, **rates: float) -> list[Reading]:
    """Readings of a job that does so many steps per second (`steps`), and says these values."""
    steps = rates.pop("steps", None)
    moments = [n * seconds for n in range(int(until_s / seconds) + 1)]
    return [reading(at, None if steps is None else int(at * steps), **rates) for at in moments]


SPEEDS = {
    "steps, where nothing else is reported": (every(10, 100, steps=2), ("steps_per_s", 2.0)),
    "samples, where the global batch is reported": (every(10, 100, steps=2, global_batch=64), ("samples_per_s", 128.0)),
    "samples per second as reported": (every(10, 100, steps=2, samples_per_s=90), ("samples_per_s", 90.0)),
    "rather than by the batch": (every(10, 100, steps=2, samples_per_s=90, global_batch=8), ("samples_per_s", 90.0)),
    "tokens before all else": (every(10, 100, steps=2, tokens_per_s=5e4, samples_per_s=9), ("tokens_per_s", 5e4)),
    "tokens without any step": (every(10, 100, tokens_per_s=5e4), ("tokens_per_s", 5e4)),
    "steps, where what is reported is no rate": (every(10, 100, steps=2, tokens_per_s=0), ("steps_per_s", 2.0)),
    "nothing in less than a minute": (every(10, 50, steps=2), ("steps_per_s", None)),
    "nothing of a few long steps": (every(10, 300, steps=0.03), ("steps_per_s", None)),
    "nothing of a job that makes no step": (every(10, 300, steps=0), ("steps_per_s", None)),
}


@pytest.mark.parametrize("sentence", SPEEDS)
def test_what_is_told(sentence: str) -> None:
    readings, expected = SPEEDS[sentence]
    known = after(*readings)
    assert known is not None
    assert (known.unit, known.speed) == (expected[0], expected[1] and pytest.approx(expected[1], rel=1e-3))


def test_a_job_that_reports_no_progress_is_not_measured() -> None:
    assert after(*every(10, 300, loss=2.0)) is None


def test_what_an_attempt_did_before_its_first_reading_does_not_count() -> None:
    """It went on from a checkpoint, say."""
    known = after(reading(0, 1_000_000), reading(100, 1_000_200))
    assert known is not None and known.speed == 2.0


def test_attempts_of_one_size_add_up_and_the_time_between_them_does_not_count() -> None:
    known = after(reading(0, 0), reading(40, 80), reading(9000, 500, "b"), reading(9040, 580, "b"))
    assert known is not None and (known.seconds, known.speed) == (80, 2.0)


def test_a_step_that_goes_back_is_none() -> None:
    known = after(reading(0, 100), reading(50, 200), reading(60, 0), reading(110, 100))
    assert known is not None and (known.work, known.seconds) == (200, 110)


def test_a_reading_that_is_not_later_changes_nothing() -> None:
    known = after(reading(0, 0), reading(40, 80))
    assert known is not None and measure(known, reading(40, 90)) is known


def test_another_unit_starts_afresh() -> None:
    known = after(*every(10, 100, steps=2))
    assert known is not None and known.speed == 2.0
    other = measure(known, reading(200, 400, tokens_per_s=9.0))
    assert other is not None and (other.unit, other.speed, other.seconds) == ("tokens_per_s", None, 0)


@pytest.mark.parametrize("gap", [{}, {"tokens_per_s": 0.0}, {"samples_per_s": 9.0}])
def test_a_reading_without_what_was_reported_before_is_passed_over(gap: dict[str, float]) -> None:
    known = after(*every(10, 100, steps=2, tokens_per_s=50), reading(110, 220, "a", **gap))
    assert known is not None and (known.unit, known.speed, known.seconds) == ("tokens_per_s", 50, 100)
    later = measure(known, reading(120, 240, tokens_per_s=50))
    assert later is not None and (later.work, later.seconds, later.counted) == (50 * 110, 110, 220)
    assert measure(known, reading(100, 240, "a", **gap)) is known, "nor does it go back in time"


def test_another_attempt_may_report_less() -> None:
    known = after(*every(10, 100, tokens_per_s=50), reading(200, 0, "b"), reading(260, 120, "b"))
    assert known is not None and (known.unit, known.speed) == ("steps_per_s", 2.0)


def test_noise_is_not_told_and_a_lasting_change_is() -> None:
    known = after(*every(10, KEEP_S, steps=2))
    at_s, step = KEEP_S, int(KEEP_S * 2)
    told = []
    for _ in range(60):
        at_s, step = at_s + 100, step + 100  # half as fast
        known = measure(known, reading(at_s, step))
        assert known is not None and known.speed is not None
        told.append(known.speed)
    assert told[0] == 2.0 and told[1] == 2.0, "not at once"
    assert told[-1] == pytest.approx(1.2, abs=0.1), "in the end"
    assert len(set(told)) < 15 and all(a / b - 1 > CHANGE for a, b in pairwise(told) if a != b)
    assert known is not None and known.seconds == KEEP_S


def test_it_takes_both_time_and_steps() -> None:
    assert (STEADY_S, COUNT_MIN) == (60, 10)
    enough = after(reading(0, 0), reading(60, 10))
    assert enough is not None and enough.speed == pytest.approx(1 / 6, rel=1e-3)
    for at_s, step in ((59, 10), (60, 9)):
        few = after(reading(0, 0), reading(at_s, step))
        assert few is not None and few.speed is None
