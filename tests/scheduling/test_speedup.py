"""How fast an elastic job is taken to be: what was measured, and the prior around it."""

import pytest
from phalanx_server.scheduling.snapshot import Job
from phalanx_server.scheduling.speedup import LOST_PER_DOUBLING, progress, speedup_of


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
