"""Predictions from history: which group is believed, what is said of jobs that run on, and how good it was."""

from random import Random

import pytest
from phalanx_server.scheduling import predict
from phalanx_server.scheduling.predict import Calibration, Expectation, Predictor, Work, rounded


def work(**given):
    return Work(**{"tenant": "t", "gpus": 1, **given})


def taught(*ends):
    predictor = Predictor()
    for given, run_s in ends:
        predictor.observe(work(**given), run_s)
    return predictor


def predicted(predictor, attained_s=0.0, **given):
    said = predictor.expect(work(**given), attained_s)
    assert said is not None
    assert said.low_s <= said.predicted_s <= said.high_s
    return said.predicted_s


def test_without_history_the_limit_is_all_that_is_known():
    assert Predictor().expect(work()) is None
    assert Predictor().expect(work(time_limit_s=3600.0)) == Expectation(3600.0, 0.0, 3600.0)


def test_the_same_kind_of_job_is_the_best_guide():
    often = [({"user": "u", "name": "train"}, 100.0), ({"user": "u", "name": "eval"}, 5.0)] * 10
    predictor = taught(*often)
    assert predicted(predictor, user="u", name="train") == 100
    assert predicted(predictor, user="u", name="eval") == 5


def test_a_name_tells_also_with_other_gpus():
    """Either it runs as long whatever it gets, or it needs as many GPU-seconds."""
    as_long = taught(*[({"name": "a", "gpus": gpus}, 600.0) for gpus in (1, 2, 4)] * 5, *[({}, 9.0)] * 15)
    as_much = taught(*[({"name": "a", "gpus": gpus}, 640.0 / gpus) for gpus in (1, 2, 4)] * 5, *[({}, 9.0)] * 15)
    assert predicted(as_long, name="a", gpus=8) == 600
    assert predicted(as_much, name="a", gpus=8) == 80


def test_a_new_kind_falls_back_on_its_user_its_tenant_then_on_all():
    predictor = taught(
        *[({"user": "u", "name": "a"}, 100.0)] * 5,
        *[({"user": "v", "name": "a"}, 10.0)] * 5,
        *[({"tenant": "s", "user": "w"}, 1_000.0)] * 5,
    )
    assert predicted(predictor, user="u", name="new") == 100
    assert predicted(predictor, tenant="s", user="new", gpus=4) == 1_000
    assert predicted(predictor, tenant="new") == 100, "the middle of all"


def test_the_group_that_erred_least_is_believed():
    dice = Random(1)
    predictor = Predictor()
    for _ in range(200):  # run times tell nothing, but everybody asks for four times what they need
        run_s = 10 ** dice.uniform(1, 5)
        predictor.observe(work(user="u", name="n", time_limit_s=4 * run_s), run_s)
    assert predicted(predictor, user="u", name="n", time_limit_s=8_000.0) == 2_000


def test_old_run_times_are_forgotten():
    predictor = taught(*[({}, 10.0)] * 500, *[({}, 1_000.0)] * predict.WINDOW)
    assert predicted(predictor) == 1_000
    assert len(predictor._groups[()].sorted) == predict.WINDOW


def test_a_job_that_runs_on_is_compared_with_those_that_ran_longer():
    predictor = taught(*[({}, 10.0)] * 8, *[({}, 500.0)] * 4)
    assert predicted(predictor) == 10
    assert predicted(predictor, attained_s=20.0) == 500


def test_a_job_that_outlived_all_is_expected_to_need_as_long_again_within_its_limit():
    predictor = taught(*[({}, 10.0)] * 4)
    assert predicted(predictor, attained_s=40.0) == 80
    assert predicted(predictor, attained_s=40.0, time_limit_s=60.0) == 60
    assert predicted(predictor, attained_s=70.0, time_limit_s=60.0) == 140, "a limit that is past says nothing"


def test_predictions_have_two_digits_so_that_classes_stay_few():
    assert [rounded(s) for s in (0.0, 7.49, 1234.0, 98_765.0)] == [0.0, 7.5, 1200.0, 99_000.0]
    assert predicted(taught(({}, 1234.5))) == 1200


def test_the_interval_holds_four_in_five():
    dice, predictor = Random(3), Predictor()
    for number in range(3_000):
        its = work(user=f"u{number % 7}")
        said = predictor.expect(its)
        predictor.observe(its, dice.lognormvariate(5 + number % 7, 1.0), said)
    figures = predictor.calibration.document()
    assert 0.75 < figures["within_interval"] < 0.88
    assert figures["mean_log_error"] == pytest.approx(0.8, abs=0.05), "of a log-normal with σ = 1: √(2/π)"
    assert figures["pinball_loss"] < 0.3


def test_calibrations_add_up():
    one, two = Calibration(), Calibration()
    one.record(Expectation(10.0, 5.0, 20.0), 10.0)
    two.record(Expectation(10.0, 5.0, 20.0), 40.0)
    both = (one + two).document()
    assert (both["jobs"], both["within_interval"], both["mean_log_error"]) == (2, 0.5, 0.6931)
    assert Calibration().document()["jobs"] == 0


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(predict, "MOST_GROUPS", 50)
    predictor = taught(*[({"user": f"u{i}"}, 10.0) for i in range(100)])
    assert len(predictor._groups) == 50
    assert predicted(predictor) == 10, "what is used stays"


def test_an_edition_ends_with_each_tenth_more_that_is_known():
    predictor, editions = Predictor(), []
    for _ in range(1_000):
        predictor.observe(work(), 10.0)
        editions.append(predictor.edition)
    assert editions[:3] == [1, 2, 3], "at first each end tells much"
    assert editions[-1] < 70, "so that thousands of ends make few"
