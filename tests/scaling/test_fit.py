"""The fit finds known constants again, ends at the minimum, and is not moved by a run that went wrong."""

from dataclasses import replace

import numpy as np
import pytest
from phalanx_server.scaling.diagnosis import determined
from phalanx_server.scaling.fit import HUBER_DELTA, Problem, _descend, fit
from phalanx_server.scaling.law import Law
from phalanx_server.scaling.runs import sample_of
from phalanx_server.scaling.uncertainty import bootstrap, numbers_of

LAWS = {
    "Hoffmann et al. 2022": Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Besiroglu et al. 2024": Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    "steep in tokens": Law(E=0.9, A=60.0, B=5e4, alpha=0.22, beta=0.55),
    "no floor to speak of": Law(E=0.2, A=30.0, B=40.0, alpha=0.15, beta=0.12),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_constants_are_found_again_from_runs_without_noise(samples, law):
    found = fit(samples(law=law)).law
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4), name


@pytest.mark.parametrize("law", list(LAWS.values())[:3], ids=list(LAWS)[:3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_of_half_a_percent_moves_exponents_by_a_tenth_and_the_floor_by_a_twentieth(samples, law, seed):
    found = fit(samples(law=law, sizes=6, counts=6, noise=0.005, seed=seed)).law
    assert found.alpha == pytest.approx(law.alpha, rel=0.1) and found.beta == pytest.approx(law.beta, rel=0.1)
    assert abs(found.E / law.E - 1) < 0.05
    assert found.loss(1e11, 2e12) == pytest.approx(law.loss(1e11, 2e12), rel=0.02), "ten times further out"


def test_small_sweeps_of_small_models_are_fitted_too(samples):
    law = Law(E=1.2, A=12.0, B=30.0, alpha=0.25, beta=0.3)
    found = fit(samples(law=law, sizes=4, counts=4, parameters=(2e4, 2e6), tokens=(1e5, 1e7))).law
    assert found.alpha == pytest.approx(0.25, rel=1e-3) and abs(found.E / 1.2 - 1) < 1e-3


def test_a_run_that_went_wrong_hardly_counts(runs, hoffmann):
    good = runs(noise=0.002, sizes=5, counts=5)
    bad = [*good[:7], replace(good[7], loss=2 * good[7].loss), *good[8:]]
    before, after = fit(sample_of(good)), fit(sample_of(bad))
    for name in ("E", "alpha", "beta"):
        assert getattr(after.law, name) == pytest.approx(getattr(before.law, name), rel=0.03), name
    assert np.abs(after.residuals).argmax() == 7
    squares = np.polyfit(range(25), [run.loss for run in bad], 1), np.polyfit(range(25), [run.loss for run in good], 1)
    assert abs(squares[0][1] - squares[1][1]) > 0.03, "it would move a fit by squares"


def test_starts_agree_and_the_gradient_is_that_of_the_objective(samples):
    sample = samples(noise=0.003)
    assert fit(sample).agreeing == fit(sample).starts
    problem, x, step = Problem.of(sample), np.array([0.5, -0.3, 0.4, -1.0, -1.2]), 1e-6
    _, gradient = problem(x)
    for i in range(5):
        ahead, behind = (problem(x + sign * step * np.eye(5)[i])[0] for sign in (1, -1))
        assert gradient[i] == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_no_start_of_the_paper_s_grid_ends_lower(samples):
    """A few of the 4,500; of 1,125 that were tried by hand on each of four sweeps none did."""
    sample = samples(noise=0.004, seed=4)
    problem, best = Problem.of(sample), fit(sample).objective
    random = np.random.default_rng(0)
    for _ in range(12):
        log_a, log_b = random.choice(np.arange(0, 26, 5), 2)
        alpha, beta = np.maximum(random.choice(np.arange(0, 2.1, 0.5), 2), 0.01)
        a, b = log_a - alpha * problem.centre_n, log_b - beta * problem.centre_d
        start = np.array([a, b, random.choice([-1, -0.5, 0, 0.5, 1]), np.log(alpha), np.log(beta)])
        assert _descend(problem, start)[0] >= best * (1 - 1e-6)
    assert best == pytest.approx(problem(problem.point(fit(sample).law))[0])


def test_a_term_without_a_trace_is_named(samples):
    assert fit(samples(law=Law(E=1.7, A=400.0, B=1e-9, alpha=0.34, beta=0.3))).missing == ("B",)
    assert HUBER_DELTA == 1e-3, "the paper's"


def test_the_interval_holds_the_truth(samples, hoffmann):
    sample = samples(noise=0.005, seed=5)
    found = fit(sample)
    ensemble = bootstrap(sample, found, level=0.9, resamples=60, seed=0, usable=determined)
    numbers = numbers_of(found.law, ensemble)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert numbers[name].low < getattr(hoffmann, name) < numbers[name].high, name
    run = ensemble.of_run(found.law, parameters=7e10, tokens=1.4e12)
    assert run.low < hoffmann.loss(7e10, 1.4e12) < run.high < 1.1 * run.low


@pytest.mark.slow
def test_intervals_of_nine_in_ten_hold_the_truth_about_so_often(samples, hoffmann):
    """12 sweeps: alpha and beta should each be held 10.8 times, and less than 7 times in a thousandth of all cases."""
    held = {"alpha": 0, "beta": 0, "E": 0, "a": 0, "run": 0}
    truth = {"alpha": 0.34, "beta": 0.28, "E": 1.69, "a": 0.28 / 0.62, "run": float(hoffmann.loss(7e10, 1.4e12))}
    for seed in range(12):
        sample = samples(noise=0.005, seed=seed, sizes=5, counts=5)
        found = fit(sample)
        ensemble = bootstrap(sample, found, level=0.9, resamples=60, seed=0, usable=determined)
        numbers = numbers_of(found.law, ensemble)
        numbers["run"] = ensemble.of_run(found.law, parameters=7e10, tokens=1.4e12)
        for name in held:
            held[name] += numbers[name].low <= truth[name] <= numbers[name].high
    assert min(held.values()) >= 7 and sum(held.values()) >= 48, held


def test_the_same_seed_gives_the_same_intervals_and_another_does_not(samples):
    sample = samples(noise=0.005, sizes=4, counts=4)
    found = fit(sample)

    def ensemble(seed):
        return bootstrap(sample, found, level=0.9, resamples=30, seed=seed, usable=determined)

    first = ensemble(1)
    assert first.laws == ensemble(1).laws != ensemble(2).laws
    wide = numbers_of(found.law, first)["alpha"]
    narrow = numbers_of(found.law, replace(first, level=0.5))["alpha"]
    assert wide.low < narrow.low < narrow.high < wide.high
