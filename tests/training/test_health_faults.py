"""Faults put into real trainings on two ranks, and what is made of them at once. What training goes back from is in
`test_health_rollbacks.py`."""

import math

import pytest
from fault_gang import BLAMELESS, case, outcomes, told

FLIPPED_HIGH = {"flip": {"batches": [6], "ranks": [1], "bit": 30}}
FLIPPED_LOW = {"flip": {"batches": [6], "ranks": [1], "bit": 3}}
RISING = {"loss": {"batches": list(range(10, 99)), "factor": 9}}
SLOW = {"slow": {"batches": list(range(99)), "ranks": [1], "seconds": 0.1}}

CASES = {
    "flip_healed": case(
        health={**BLAMELESS, "corruption": {"action": "rollback", "every": 4}}, faults=FLIPPED_LOW, keeps_every=5
    ),
    "transient": case(health=BLAMELESS, faults={"gradient": {"batches": [5], "ranks": [1], "tries": 1}}),
    "skipped": case(health=BLAMELESS, faults={"gradient": {"batches": [5, 6], "ranks": [1]}}),
    "nan_loss": case(health=BLAMELESS, faults={"loss": {"batches": [5], "ranks": [1], "factor": "nan"}}),
    "nan_warn": case(
        health={**BLAMELESS, "nan": {"action": "warn"}},
        faults={"gradient": {"batches": [22], "ranks": [1]}},
    ),
    "stopped": case(health={**BLAMELESS, "nan": {"action": "stop"}}, faults={"gradient": {"batches": [5]}}),
    "no_checkpoints": case(
        health={**BLAMELESS, "nan": {"action": "rollback"}}, faults={"gradient": {"batches": [5]}}, keeps_every=None
    ),
    "spike": case(health=BLAMELESS, faults={"loss": {"batches": [15, 16], "factor": 9}}),
    "spike_skipped": case(
        health={**BLAMELESS, "spike": {"action": "skip"}}, faults={"loss": {"batches": [15], "factor": 9}}
    ),
    "spike_stopped": case(
        health={**BLAMELESS, "spike": "stop"}, faults={"loss": {"batches": [10], "ranks": [1], "factor": 9}}
    ),
    "diverged": case(
        health={**BLAMELESS, "spike": "off", "divergence": {"steps": 2}}, faults=RISING, train={"steps": 21}
    ),
    "diverged_stopped": case(
        health={**BLAMELESS, "spike": "off", "divergence": {"action": "stop", "steps": 2}}, faults=RISING
    ),
    "flip_stopped": case(health={**BLAMELESS, "corruption": {"action": "stop", "every": 4}}, faults=FLIPPED_HIGH),
    "flip_named": case(health={**BLAMELESS, "corruption": {"action": "warn", "every": 4}}, faults=FLIPPED_HIGH),
    "slow": case(
        health={"straggler": {"action": "warn", "window": 5, "factor": 2.0}}, faults=SLOW, train={"steps": 12}
    ),
    **{
        f"slow, {action}": case(health={"straggler": {"action": action, "window": 5, "factor": 2.0}}, faults=SLOW)
        for action in ("restart", "stop")
    },
}


@pytest.fixture(scope="module")
def seen():
    return outcomes(CASES, ranks=2)


def test_a_gradient_that_is_nan_once_is_computed_again_and_applied(seen):
    outcome = seen["transient"]
    assert told(outcome) == [("corruption", "warn")]
    assert "step 5 came out differently" in outcome[0]["marks"][0]["message"]
    assert all(outcome[0]["updated"])
    assert math.isfinite(outcome[0]["losses"][-1])


def test_a_gradient_that_stays_nan_is_skipped_on_every_rank_and_told_once(seen):
    outcome = seen["skipped"]
    assert told(outcome) == [("nan", "skip")]
    assert outcome[0]["marks"][0]["message"] == "the gradient of step 5 is not finite"
    for rank in outcome:
        assert [step for step, updated in zip(rank["steps"], rank["updated"], strict=True) if not updated] == [5, 6]
    assert math.isfinite(outcome[0]["losses"][-1])


def test_a_loss_that_is_nan_on_one_rank_names_it(seen):
    mark = seen["nan_loss"][0]["marks"][0]
    assert (mark["check"], mark["blamed"], mark["step"]) == ("nan", 1, 5)


def test_with_warn_the_update_is_applied_and_the_run_is_lost(seen):
    outcome = seen["nan_warn"]
    assert told(outcome)[0] == ("nan", "warn")
    assert all(outcome[0]["updated"])
    assert math.isnan(outcome[0]["losses"][-1])


def test_stop_ends_every_rank_and_says_why(seen):
    outcome = seen["stopped"]
    assert [rank["ended"] for rank in outcome] == ["the gradient of step 5 is not finite: stop"] * 2
    assert told(outcome) == [("nan", "stop")]


def test_without_checkpoints_a_rollback_is_a_restart(seen):
    assert told(seen["no_checkpoints"]) == [("nan", "restart")]
    assert all(rank["ended"] for rank in seen["no_checkpoints"])


def test_a_spike_is_told_once_while_it_lasts(seen):
    outcome = seen["spike"]
    assert told(outcome) == [("spike", "warn")]
    assert outcome[0]["marks"][0]["step"] == 15
    assert all(outcome[0]["updated"])


def test_a_batch_with_a_spike_can_be_skipped(seen):
    outcome = seen["spike_skipped"]
    assert told(outcome) == [("spike", "skip")]
    assert [step for step, updated in zip(outcome[0]["steps"], outcome[0]["updated"], strict=True) if not updated] == [
        15
    ]


def test_a_spike_can_end_the_job_before_its_update(seen):
    outcome = seen["spike_stopped"]
    assert told(outcome) == [("spike", "stop")]
    for rank in outcome:
        assert rank["ended"].startswith("the loss of step 10 is ") and rank["ended"].endswith(" is usual: stop")
        assert rank["steps"] == list(range(1, 10))


def test_a_divergence_is_told_once_and_trained_through_where_nothing_else_is_asked(seen):
    outcome = seen["diverged"]
    assert told(outcome) == [("divergence", "warn")]
    assert outcome[0]["marks"][0]["message"].endswith("for 2 steps until step 19")
    for rank in outcome:
        assert (rank["last"], rank["ended"]) == (21, None)
        assert rank["steps"] == list(range(1, 22)) and all(rank["updated"])


def test_a_divergence_can_end_the_job(seen):
    outcome = seen["diverged_stopped"]
    assert told(outcome) == [("divergence", "stop")]
    for rank in outcome:
        assert rank["ended"].endswith("for 2 steps until step 19: stop")
        assert rank["steps"] == list(range(1, 20))


def test_a_flipped_bit_can_end_the_job(seen):
    outcome = seen["flip_stopped"]
    assert told(outcome) == [("nan", "skip"), ("corruption", "stop")]
    assert outcome[0]["marks"][1]["blamed"] == 1
    for rank in outcome:
        assert "parameters of rank 1 differ" in rank["ended"] and rank["ended"].endswith(": stop")
        assert rank["steps"] == list(range(1, 9))


def test_a_flipped_high_bit_names_its_rank_even_of_two(seen):
    (mark,) = [mark for mark in seen["flip_named"][0]["marks"] if mark["step"] == 8]
    assert (mark["check"], mark["blamed"]) == ("corruption", 1)
    assert "on rank 1" in mark["message"]


def test_a_slow_rank_is_named_once(seen):
    outcome = seen["slow"]
    assert told(outcome) == [("straggler", "warn")]
    assert outcome[0]["marks"][0]["blamed"] == 1
    assert "times the median" in outcome[0]["marks"][0]["message"]


@pytest.mark.parametrize("action", ["restart", "stop"])
def test_a_slow_rank_can_end_the_attempt_or_the_job(seen, action):
    outcome = seen[f"slow, {action}"]
    assert told(outcome) == [("straggler", action)]
    assert outcome[0]["marks"][0]["blamed"] == 1
    assert all("rank 1 works" in rank["ended"] and rank["ended"].endswith(f": {action}") for rank in outcome)


def test_a_flipped_bit_is_healed_by_going_back(seen):
    outcome = seen["flip_healed"]
    assert told(outcome) == [("corruption", "rollback")]
    assert outcome[0]["same_parameters"]
    assert outcome[0]["steps"][7:10] == [8, 6, 7]
