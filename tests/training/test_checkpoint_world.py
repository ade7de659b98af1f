"""Checkpoints of real gangs: read by other layouts and world sizes, and left usable by a rank that is killed."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out

from checkpoint_world import run


def test_another_layout_and_world_size_go_on_from_the_same_tensors(tmp_path):
    answer = run("layouts", tmp_path)
    legs = answer["legs"]
    assert [[rank["restored"] for rank in leg] for leg in legs] == [[None, None], [3], [5, 5], [8, 8]]
    for before, after in pairwise(legs):
        for rank in after:
            assert rank["found"] == pytest.approx(before[0]["left"], rel=1e-12), "every tensor of model and optimizer"
    assert len(legs[0][0]["left"]) >= 4 * 4  # parameters, two moments and the step of each
    losses = [loss for leg in legs for loss in leg[0]["losses"]]
    assert losses == pytest.approx(answer["undisturbed"], rel=1e-5)


def test_where_the_storage_fails_one_rank_all_say_so_and_nothing_is_given_up(tmp_path):
    written, read, restored = run("one_fails", tmp_path)
    assert all("the last checkpoint, of step 30, could not be saved" in said for said in written)
    assert all("step-000000020" in said and "cannot be read" in said for said in read)
    assert restored == [20, 20]


def test_a_process_killed_at_any_moment_of_a_save_leaves_a_usable_checkpoint(tmp_path):
    check_crashes(run("crashes", tmp_path, 1, 9))


EVERY = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize("stride", [pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=EVERY)])
def test_either_of_two_ranks_killed_at_any_moment_of_a_save_leaves_a_usable_checkpoint(tmp_path, stride):
    check_crashes(run("crashes", tmp_path, 2, stride))


def check_crashes(answers):
    for victim in {answer["victim"] for answer in answers}:
        of_victim = [answer for answer in answers if answer["victim"] == victim]
        assert [answer["killed"] for answer in of_victim] == [True] * (len(of_victim) - 1) + [False]
        restored = [answer["restored"] for answer in of_victim]
        assert set(restored) <= {10, 20} and restored == sorted(restored), "the one before, until the new one is whole"
        assert restored[0] == 10 and restored[-1] == 20
        for answer in of_victim:  # and the next attempt saves as ever
            assert answer["after"] == (20 if answer["restored"] == 10 else 30)
