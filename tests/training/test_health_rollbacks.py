"""Faults put into real trainings on two ranks from which training goes back, or cannot, and what compression and loss
scales remember of them."""

import itertools
import math

import pytest
from fault_gang import BLAMELESS, case, outcomes, told

pytestmark = pytest.mark.slow
FLIPPED_LOW = {"flip": {"batches": [6], "ranks": [1], "bit": 3}}
POWERSGD = {"compress": "powersgd"}  # from its eleventh step on

# The defaults at a scale of 1:25: 20 steps until a divergence is found, a checkpoint every 4, and the last 3 are kept.
DIVERGING = {
    "health": {**BLAMELESS, "spike": "off", "divergence": {"action": "rollback", "steps": 20}},
    "faults": {"loss": {"batches": list(range(42, 77)), "factor": 9}},
    "to_files": True,
    "train": {"steps": 80},
    "optim": {"lr": 1e-3},
}


CASES = {
    "too_many": case(
        health={**BLAMELESS, "nan": {"most": 2}}, faults={"gradient": {"batches": [8, 9, 10]}}, keeps_every=5
    ),
    "too_many_with_files": case(
        health={**BLAMELESS, "nan": {"most": 2}},
        faults={"gradient": {"batches": [8, 9, 10]}},
        keeps_every=5,
        to_files=True,
    ),
    "hopeless": case(
        health={**BLAMELESS, "nan": {"action": "rollback"}},
        faults={"gradient": {"batches": list(range(8, 99))}},
        keeps_every=5,
    ),
    "spikes_then_nan": case(
        health={**BLAMELESS, "nan": {"most": 2}},
        faults={"loss": {"batches": [14, 15, 16, 17], "factor": 9}, "gradient": {"batches": [18]}},
        keeps_every=None,
    ),
    "spikes_skipped_then_nan": case(
        health={**BLAMELESS, "nan": {"most": 2}, "spike": {"action": "skip"}},
        faults={"loss": {"batches": [14, 15], "factor": 9}, "gradient": {"batches": [16, 17]}},
        keeps_every=None,
    ),
    "too_many_spikes": case(
        health={**BLAMELESS, "nan": {"most": 2}, "spike": {"action": "skip"}},
        faults={"loss": {"batches": [16, 17, 18], "factor": 9}},
        keeps_every=5,
    ),
    "spike_rolled_back": case(
        health={**BLAMELESS, "spike": "rollback"}, faults={"loss": {"batches": [15], "factor": 9}}, keeps_every=5
    ),
    "diverged": case(
        health={**BLAMELESS, "spike": "off", "divergence": {"action": "rollback", "steps": 2}},
        faults={"loss": {"batches": list(range(12, 26)), "factor": 9}},
        keeps_every=5,
    ),
    "diverging_on": case(
        health={**BLAMELESS, "spike": "off", "divergence": {"action": "rollback", "steps": 2}},
        faults={"loss": {"batches": list(range(22, 70)), "factor": 9}},
        keeps_every=5,
        train={"steps": 46},
        optim={"lr": 1e-3},
    ),
    "diverged_with_files": case(**DIVERGING, keeps_every=4),
    "diverged_and_resumed": case(
        **{**DIVERGING, "faults": {**DIVERGING["faults"], "stop": {"batch": 60}}}, keeps_every=4, resumes=True
    ),
    "diverged_before_the_first": case(**DIVERGING, keeps_every=48),
    "diverged_without_checkpoints": case(**DIVERGING, keeps_every=None),
    "nan_before_the_first": case(
        health={**BLAMELESS, "nan": {"action": "rollback"}}, faults={"gradient": {"batches": [5]}}, keeps_every=10
    ),
    "flip_unnamed": case(health={**BLAMELESS, "corruption": {"action": "restart", "every": 4}}, faults=FLIPPED_LOW),
    "flip_not_kept": case(health={**BLAMELESS, "corruption": "warn"}, faults=FLIPPED_LOW, keeps_every=5),
    "powersgd_skipped": case(
        health=BLAMELESS, faults={"gradient": {"batches": [15], "ranks": [1]}}, keeps_every=5, parallel=POWERSGD
    ),
    "powersgd_rolled_back": case(
        health={**BLAMELESS, "nan": {"action": "rollback"}},
        faults={"gradient": {"batches": [15], "ranks": [1]}},
        keeps_every=5,
        parallel=POWERSGD,
    ),
    "powersgd_overflowing": case(
        health={**BLAMELESS, "spike": "off"},
        train={"steps": 40},
        parallel=POWERSGD,
        precision={"compute": "fp16", "loss_scale": 2.0**20, "loss_scale_interval": 6},
    ),
    **{
        f"powersgd_healed_of_bit_{bit}": case(
            health={**BLAMELESS, "corruption": {"action": "rollback", "every": 4}},
            faults={"flip": {"batches": [14], "ranks": [1], "bit": bit}},
            keeps_every=5,
            parallel=POWERSGD,
        )
        for bit in (3, 21)
    },
    "stopped_while_going_back": case(
        health={**BLAMELESS, "nan": {"action": "rollback"}},
        faults={"gradient": {"batches": [24]}, "stop": {"batch": 24}},
        keeps_every=5,
    ),
    "overflow_alone": case(
        health=BLAMELESS,
        faults={"gradient": {"batches": [1, 6], "ranks": [1]}},
        precision={"compute": "fp16", "loss_scale": 1024},
        parallel={"local": {"every": 4}},
    ),
}


@pytest.fixture(scope="module")
def seen():
    return outcomes(CASES, ranks=2)


def test_gradients_that_overflow_in_one_replica_that_trains_alone_are_skipped_by_all(seen):
    """What is counted of updates, as that it is time to tell of memory, and the scale stay the same on all ranks."""
    outcome = seen["overflow_alone"]
    assert told(outcome) == []
    for rank in outcome:
        assert [step for step, updated in zip(rank["steps"], rank["updated"], strict=True) if not updated] == [1, 6]
        assert rank["loss_scale"] == 256
        assert rank["same_parameters"]


@pytest.mark.parametrize("name", ["too_many", "too_many_with_files"])
def test_after_too_many_skipped_steps_training_goes_back_and_on_with_later_data(seen, name):
    outcome = seen[name]
    assert told(outcome) == [("nan", "skip"), ("nan", "rollback")]
    assert outcome[0]["steps"][7:12] == [8, 9, 10, 6, 7]
    assert outcome[0]["losses"][10:] == outcome[1]["losses"][10:]
    assert math.isfinite(outcome[0]["losses"][-1]) and outcome[0]["steps"][-1] == 24
    assert outcome[0]["reports"][-1]["lost_s"] > 0


def test_a_nan_before_the_first_checkpoint_is_a_restart(seen):
    assert told(seen["nan_before_the_first"]) == [("nan", "rollback"), ("nan", "restart")]
    assert "no checkpoint from before step 5" in seen["nan_before_the_first"][0]["ended"]


def test_what_no_rollback_cures_is_stopped(seen):
    outcome = seen["hopeless"]
    assert told(outcome) == [("nan", "rollback")] * 5 + [("nan", "stop")]
    assert all(rank["ended"] for rank in outcome)


def test_who_goes_back_from_the_last_step_and_is_to_stop_has_not_taken_it(seen):
    """Else the job would count as finished. One step more is taken, so that the data of the bad one stay behind."""
    outcome = seen["stopped_while_going_back"]
    assert told(outcome) == [("nan", "rollback")]
    assert [rank["last"] for rank in outcome] == [21, 21]
    assert outcome[0]["steps"][-2:] == [24, 21]


def test_spikes_that_are_only_told_are_no_refused_updates(seen):
    outcome = seen["spikes_then_nan"]
    assert told(outcome) == [("spike", "warn"), ("nan", "skip")]
    assert [step for step, updated in zip(outcome[0]["steps"], outcome[0]["updated"], strict=True) if not updated] == [
        18
    ]


def test_skipped_spikes_and_skipped_nans_are_counted_each_on_their_own(seen):
    outcome = seen["spikes_skipped_then_nan"]
    assert told(outcome) == [("spike", "skip"), ("nan", "skip")]
    assert outcome[0]["updated"].count(False) == 4 and outcome[0]["ended"] is None


def test_after_too_many_skipped_spikes_training_goes_back(seen):
    outcome = seen["too_many_spikes"]
    assert told(outcome) == [("spike", "skip"), ("spike", "rollback")]
    assert outcome[0]["steps"][15:20] == [16, 17, 18, 16, 17]


def test_a_spike_can_be_gone_back_from_at_once(seen):
    """Its update is refused, what was applied since the last checkpoint goes with it, and its data stay behind."""
    outcome = seen["spike_rolled_back"]
    assert told(outcome) == [("spike", "rollback")]
    for rank in outcome:
        assert rank["steps"] == [*range(1, 16), *range(11, 25)]
        assert [i for i, updated in enumerate(rank["updated"]) if not updated] == [14]
        assert rank["losses"][15] < rank["losses"][14] / 2
        assert rank["ended"] is None and rank["same_parameters"]


def test_a_divergence_goes_back_to_before_it_began(seen):
    outcome = seen["diverged"]
    assert told(outcome)[0] == ("divergence", "rollback")
    steps = outcome[0]["steps"]
    back = next(after for before, after in itertools.pairwise(steps) if after <= before)
    assert back <= 16
    assert steps[-1] == 24


def test_what_was_known_of_the_loss_is_restored_so_that_a_divergence_that_comes_back_is_found(seen):
    outcome = seen["diverging_on"]
    assert told(outcome) == [("divergence", "rollback")] * 2
    assert outcome[0]["last"] == 46


@pytest.mark.parametrize("name", ["diverged_with_files", "diverged_and_resumed"])
def test_the_checkpoint_from_before_a_divergence_is_still_there_when_it_is_found(seen, name):
    """Though more have been made since than are kept, and whether or not another attempt went on meanwhile."""
    outcome = seen[name]
    assert told(outcome) == [("divergence", "rollback")]
    assert "until step 76" in outcome[0]["marks"][0]["message"]
    assert outcome[0]["steps"] == [*range(1, 77), *range(41, 81)]
    assert outcome[0]["losses"][76] < outcome[0]["losses"][75] / 2


def test_a_divergence_without_a_checkpoint_from_before_it_ends_the_job(seen):
    """A restart would go on from the one of step 48, in the midst of it."""
    outcome = seen["diverged_before_the_first"]
    assert told(outcome) == [("divergence", "rollback"), ("divergence", "stop")]
    for rank in outcome:
        assert "no checkpoint from before step 41" in rank["ended"] and "checkpoint.every_steps" in rank["ended"]
        assert rank["steps"] == list(range(1, 77))


def test_a_divergence_without_checkpoints_ends_the_job(seen):
    assert told(seen["diverged_without_checkpoints"]) == [("divergence", "stop")]
    assert all("no checkpoints are made" in rank["ended"] for rank in seen["diverged_without_checkpoints"])


def test_a_flipped_low_bit_on_one_of_two_ranks_ends_the_attempt_without_blame(seen):
    outcome = seen["flip_unnamed"]
    assert told(outcome) == [("corruption", "restart")]
    assert outcome[0]["marks"][0]["blamed"] is None
    assert "one is wrong" in outcome[0]["marks"][0]["message"]


def test_replicas_are_compared_before_every_checkpoint(seen):
    assert seen["flip_not_kept"][0]["marks"][0]["step"] == 10


def test_a_rollback_is_the_same_from_memory_and_from_files(seen):
    assert seen["too_many"][0]["losses"][10:] == seen["too_many_with_files"][0]["losses"][10:]


def test_powersgd_forgets_a_gradient_that_is_nan_and_trains_on(seen):
    outcome = seen["powersgd_skipped"]
    assert told(outcome) == [("nan", "skip")]
    for rank in outcome:
        assert [step for step, updated in zip(rank["steps"], rank["updated"], strict=True) if not updated] == [15]
    assert outcome[0]["losses"][-1] < outcome[0]["losses"][14]


def test_powersgd_trains_on_after_a_rollback_from_nan(seen):
    outcome = seen["powersgd_rolled_back"]
    assert told(outcome) == [("nan", "rollback")]
    assert outcome[0]["steps"][14:16] == [15, 11]
    assert outcome[0]["updated"].count(False) == 1 and outcome[0]["steps"][-1] == 24
    assert outcome[0]["losses"][-1] < outcome[0]["losses"][14]


def test_powersgd_in_fp16_trains_on_after_gradients_that_overflow(seen):
    updated = seen["powersgd_overflowing"][0]["updated"]
    refused = [i for i, applied in enumerate(updated) if not applied and i > 10]
    assert refused, "the loss scale did not grow until gradients overflow"
    assert all(updated[i + 1] for i in refused if i + 1 < len(updated))


def test_what_powersgd_left_out_before_a_rollback_is_not_added_after_it(seen):
    """From one checkpoint, with the same data, it is the same whatever went astray before."""
    low, high = (seen[f"powersgd_healed_of_bit_{bit}"] for bit in (3, 21))
    assert told(low) == told(high) == [("corruption", "rollback")]
    assert low[0]["steps"][13:16] == [14, 15, 11]
    assert low[0]["losses"][14] != high[0]["losses"][14]
    assert low[0]["losses"][15:] == high[0]["losses"][15:]
