"""When a group counts as hung: a rule on a clock of its own."""

from __future__ import annotations

import pytest
from phalanx_worker.node.pace import Pace
from phalanx_worker.protocol import Health

RULE = Health(hang="restart", hang_factor=10.0, hang_at_least_s=60.0)


def paced(rule: Health = RULE, *, ranks: int = 1, every_s: float = 2.0, steps: int = 10) -> tuple[Pace, float]:
    """Ranks that have taken some steps, all at once; and the time of the last."""
    pace = Pace(rule)
    for step in range(steps):
        for rank in range(ranks):
            pace.step(rank, step, step * every_s)
    return pace, (steps - 1) * every_s


def looks(pace: Pace, begin: float, until: float) -> list[float]:
    """The seconds at which looks find it newly hung."""
    return [now for second in range(int(until - begin)) if pace.look(now := begin + second)]


def test_no_step_for_long_is_told_once() -> None:
    pace, at = paced()
    assert looks(pace, at, at + 200) == [at + 61]
    assert pace.hung_s > 60


def test_a_slow_job_has_the_time_of_its_own_steps() -> None:
    pace, at = paced(every_s=30.0)
    assert looks(pace, at, at + 299) == []
    assert looks(pace, at + 299, at + 400) == [at + 301]


@pytest.mark.parametrize(
    ("sentence", "pace"),
    {
        "a job that reports no steps": Pace(RULE),
        "one that wants no such look": paced(Health(hang="off"))[0],
    }.items(),
)
def test_is_never_hung(sentence: str, pace: Pace) -> None:
    assert looks(pace, 0.0, 5_000.0) == [], sentence


def test_a_job_that_stands_still_after_its_first_steps_has_more_time() -> None:
    pace, at = paced(steps=3)
    assert looks(pace, at, at + 400) == [at + 361]


def test_a_job_that_has_finished_is_never_hung() -> None:
    pace, at = paced()
    pace.finish()
    assert looks(pace, at, at + 5_000) == []


def test_a_step_a_checkpoint_and_a_step_back_show_that_it_goes_on() -> None:
    pace, at = paced()
    pace.moved(at + 50)
    assert looks(pace, at, at + 100) == []
    pace.step(0, 3, at + 100)
    assert looks(pace, at + 100, at + 160) == []
    assert looks(pace, at + 160, at + 170) == [at + 161]


def test_goes_on_after_a_hang_and_may_hang_again() -> None:
    pace, at = paced()
    assert looks(pace, at, at + 70) == [at + 61]
    pace.step(0, 10, at + 70)
    assert pace.hung_s == 0
    assert looks(pace, at + 70, at + 140) == [at + 131]


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The runner was stopped, or the whole machine."""
    pace, at = paced()
    assert looks(pace, at, at + 30) == []
    assert looks(pace, at + 1_000, at + 1_040) == [at + 1_032]


def test_names_the_one_rank_that_is_behind() -> None:
    pace, at = paced(ranks=4)
    assert pace.laggard is None
    for rank in (0, 1, 3):
        pace.step(rank, 10, at + 2)
    assert pace.laggard == 2
    pace.step(2, 10, at + 3)
    assert pace.laggard is None
    assert paced(ranks=1)[0].laggard is None
