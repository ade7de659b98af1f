"""How fast an elastic job is taken to be: what was measured, and the prior around it."""

import pytest
from phalanx_server.scheduling.snapshot import Job
from phalanx_server.scheduling.speedup import LOST_PER_DOUBLING, best_gain, progress, relative_gain, speedup_of


def job(speedup: dict[str, float] | None) -> Job:
    return Job(id="a", tenant="t", replicas=1, gpus_per_replica=1, submitted_at=0.0, state="queued", speedup=speedup)


def test_figures_are_relative_to_one_replica() -> None:
    assert speedup_of({1: 50.0, 2: 90.0, 4: 150.0}) == {"1": 1.0, "2": 1.8, "4": 3.0}


def test_where_one_was_never_run_the_prior_says_how_far_it_is() -> None:
    lost = 1 - LOST_PER_DOUBLING
    found = speedup_of({2: 90.0, 4: 150.0})
    assert found == {"2": pytest.approx(2 * lost), "4": pytest.approx(2 * lost * 150 / 90, abs=1e-3)}
    assert progress(job(found), 4) / progress(job(found), 2) == pytest.approx(150 / 90, rel=1e-3), "what was measured"


@pytest.mark.parametrize("measured", [{}, {1: 50.0}, {4: 150.0}])
def test_of_less_than_two_sizes_nothing_follows(measured: dict[int, float]) -> None:
    assert speedup_of(measured) is None


@pytest.mark.parametrize("measured", [{2: 1e-300, 3: 1e100, 4: 1e-300}, {1: 1e100, 2: 1e-300}, {1: 1.0, 2: 1e9}])
def test_what_a_job_reports_of_itself_stays_plausible(measured: dict[int, float]) -> None:
    said = speedup_of(measured)
    assert said is not None
    assert all(1e-3 <= speedup <= 2 * int(n) for n, speedup in said.items())


@pytest.mark.parametrize("speedup", [{"2": 1.8, "3": float("inf"), "4": 1.8}, {"1": 0.0, "2": 0.0, "4": 1e300}])
def test_no_speedup_ends_a_pass(speedup: dict[str, float]) -> None:
    sizes = range(1, 6)
    assert all(progress(job(speedup), n) > 0 for n in sizes)
    assert all(best_gain(job(speedup), n, 8, 1)[0] >= 0 for n in sizes)
    assert all(relative_gain(job(speedup), n, n + 1) < float("inf") for n in sizes)


def test_what_has_no_figure_is_left_out() -> None:
    assert speedup_of({1: 10.0, 2: 18.0, 3: float("inf"), 4: 0.0}) == {"1": 1.0, "2": 1.8}
