"""Runs that cannot tell are refused with the runs to add; doubts are said."""

from dataclasses import replace

import pytest
from phalanx_server.scaling.diagnosis import CannotTell, levels, refuse_too_little
from phalanx_server.scaling.law import Law
from phalanx_server.scaling.runs import Run, sample_of
from phalanx_server.scaling.study import Question, study


def of(*pairs):
    return sample_of(Run(f"{n}-{d}", n, d, 3.0, 6 * n * d) for n, d in pairs)


GRID = [(n, d) for n in (1e6, 4e6, 16e6) for d in (1e8, 4e8, 16e8)]
CASES = {
    "no runs": ([], "there are no runs to fit"),
    "four runs": ([GRID[0], GRID[4], GRID[8], GRID[2]], "at least 5 runs (9 or more are better), there are 4"),
    "one size": ([(1e6, d) for d in (1e8, 2e8, 4e8, 8e8, 16e8)], "add runs with N = 4e+06 and 2.5e+05 parameters"),
    "two sizes": (GRID[:6], "only 2 sizes, N = 1e+06, 4e+06, where 3 are needed: add runs with N = 1.6e+07"),
    "one token count": ([(n * 1e6, 1e8) for n in range(1, 7)], "D = 4e+08 and 2.5e+07 tokens, at N ="),
    "in step": ([(n * 1e6, n * 2e7) for n in (1, 2, 4, 8, 16, 32)], "such as N = 8e+06 with D = 4e+07 and D = 6.4e+08"),
}


@pytest.mark.parametrize(("pairs", "said"), CASES.values(), ids=CASES)
def test_what_the_runs_cannot_tell_is_said_with_the_runs_to_add(pairs, said):
    with pytest.raises(CannotTell) as raised:
        refuse_too_little(of(*pairs))
    assert said in str(raised.value)


def test_a_cross_of_five_runs_is_enough_to_try():
    refuse_too_little(of((1e6, 4e8), (4e6, 1e8), (4e6, 4e8), (4e6, 16e8), (16e6, 4e8)))
    refuse_too_little(of(*GRID))


def test_values_that_are_nearly_the_same_are_one_level():
    assert levels(sample_of([]).tokens) == []
    assert levels(of((100, 1), (105, 1), (109, 1), (120, 1)).parameters) == [100, 120]


ASKED = Question(resamples=50)
DOUBTS = {
    "few runs": ({"sizes": 3, "counts": 3, "noise": 0.002}, "9 runs are few"),
    "narrow": ({"parameters": (1e9, 3e9)}, "parameters vary only 3.0-fold"),
    "no trace": ({"law": Law(1.7, 1e-9, 400.0, 0.3, 0.28)}, "no trace of the A term"),
    "wide": ({"noise": 0.1, "sizes": 3, "counts": 5}, "further apart"),
}


@pytest.mark.parametrize(("given", "said"), DOUBTS.values(), ids=DOUBTS)
def test_doubts_are_said(runs, given, said):
    assert said in " | ".join(study(runs(**given), [], ASKED).warnings)


def test_intervals_of_too_few_runs_to_draw_from_are_said_to_mean_nothing(hoffmann):
    pairs = [(1e9, 4e10), (4e9, 1e10), (4e9, 4e10), (4e9, 16e10), (16e9, 4e10)]
    cross = [Run(f"{n}-{d}", n, d, float(hoffmann.loss(n, d)), 6 * n * d) for n, d in pairs]
    found = study(cross, [], ASKED)
    assert found.fit.law.loss(1e9, 1e10) == pytest.approx(hoffmann.loss(1e9, 1e10), rel=0.02)
    assert "the intervals mean nothing" in found.warnings[0]


def test_a_run_that_is_off_the_law_is_named(runs):
    some = runs(noise=0.001)
    warnings = study([*some[:3], replace(some[3], loss=some[3].loss * 1.2), *some[4:]], [], ASKED).warnings
    (said,) = [warning for warning in warnings if "lm-3" in warning]
    assert "+20" in said or "+19" in said
    assert study(some, [], ASKED).warnings == []


def test_a_forecast_far_beyond_the_runs_is_doubted(runs):
    far = study(runs(noise=0.001), [], replace(ASKED, planned=(1e12, 2e13)))
    near = study(runs(noise=0.001), [], replace(ASKED, planned=(1e10, 2e11)))
    assert "times the compute of the largest run" in far.warnings[-1] and near.warnings == []
