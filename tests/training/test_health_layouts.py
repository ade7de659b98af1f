"""Faults on four ranks, where a majority decides, and under layouts that spread a model over them."""

import math

import pytest
from fault_gang import case, outcomes

pytestmark = pytest.mark.slow

LAYOUTS = {
    "replicas": {},
    "shards": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "microbatches": 4},
    "local": {"local": {"every": 4}},
}
STRAGGLER = {"straggler": {"window": 16, "factor": 4.0}}  # four ranks share two cores: some wait up to 2.5 times longer
PEACE_STEPS = 36  # over twice the window, so that it is full whenever the ranks' times are gathered
PEACE = {"health": {"corruption": {"every": 4}, **STRAGGLER}, "train": {"steps": PEACE_STEPS}}  # all else as by default
QUIET = {"straggler": {"action": "off"}, "spike": {"action": "off"}}
CORRUPTION = {**QUIET, "corruption": {"action": "warn", "every": 4}}
LOW_BIT = {"flip": {"batches": [6], "ranks": [2], "bit": 3, "parameter": 3}}
HIGH_BIT = {"flip": {"batches": [6], "ranks": [2], "bit": 30, "parameter": 3}}
NAN = {"gradient": {"batches": [5], "ranks": [3]}}  # it holds the end of a pipeline

CASES = {
    **{f"{name} at peace": case(**PEACE, parallel=layout) for name, layout in LAYOUTS.items()},
    **{f"{name} with NaN": case(health=QUIET, faults=NAN, parallel=layout) for name, layout in LAYOUTS.items()},
    **{
        f"{name} with a high bit": case(health=CORRUPTION, faults=HIGH_BIT, parallel=LAYOUTS[name])
        for name in ("shards", "tensor", "pipeline")
    },
    "replicas with a low bit": case(health=CORRUPTION, faults=LOW_BIT),
    "replicas with a rank that cannot compute": case(
        health={**QUIET, "nan": {"action": "skip"}},
        faults={"unsteady": {"batches": [5], "ranks": [3]}, **NAN},
    ),
    "replicas with a slow rank": case(
        health={**QUIET, "straggler": {"window": 8, "factor": 2.0}},
        faults={"slow": {"batches": list(range(99)), "ranks": [2], "seconds": 0.2}},
    ),
    "pipeline with a heavy end": case(
        health={**QUIET, **STRAGGLER},
        faults={"slow": {"batches": list(range(99)), "ranks": [2, 3], "seconds": 0.1}},
        parallel=LAYOUTS["pipeline"],
    ),
    "pipeline with a slow rank": case(
        health={**QUIET, **STRAGGLER},
        faults={"slow": {"batches": list(range(99)), "ranks": [3], "seconds": 0.1}},
        parallel=LAYOUTS["pipeline"],
    ),
}


@pytest.fixture(scope="module")
def seen():
    return outcomes(CASES, ranks=4, timeout_s=280)


def marks(outcome):
    return [mark for rank in outcome for mark in rank["marks"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_without_faults_is_left_alone(seen, layout):
    """Under all checks that are on by default."""
    outcome = seen[f"{layout} at peace"]
    assert marks(outcome) == []
    assert all(rank["updated"] == [True] * PEACE_STEPS for rank in outcome)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_nan_is_skipped_under_every_layout(seen, layout):
    outcome = seen[f"{layout} with NaN"]
    assert [(mark["check"], mark["action"], mark["step"]) for mark in marks(outcome)] == [("nan", "skip", 5)]
    for rank in outcome:
        assert [step for step, updated in zip(rank["steps"], rank["updated"], strict=True) if not updated] == [5]
    assert math.isfinite(outcome[0]["losses"][-1])


def test_the_majority_of_replicas_names_the_rank_with_a_flipped_bit(seen):
    told = [mark for mark in marks(seen["replicas with a low bit"]) if mark["step"] == 8]
    assert [(mark["check"], mark["blamed"]) for mark in told] == [("corruption", 2)]
    assert not seen["replicas with a low bit"][0]["same_parameters"]


@pytest.mark.parametrize("layout", ["shards", "tensor", "pipeline"])
def test_parts_of_a_model_are_compared_with_their_own_copies(seen, layout):
    told = [mark for mark in marks(seen[f"{layout} with a high bit"]) if mark["step"] == 8]
    assert [(mark["check"], mark["blamed"]) for mark in told] == [("corruption", 2)]


def test_a_step_that_comes_out_differently_names_the_rank_that_cannot_compute(seen):
    first = marks(seen["replicas with a rank that cannot compute"])[0]
    assert (first["check"], first["blamed"]) == ("corruption", 3)
    assert "on rank 3" in first["message"]


def test_a_slow_rank_is_named_among_four(seen):
    told = marks(seen["replicas with a slow rank"])
    assert [(mark["check"], mark["blamed"]) for mark in told] == [("straggler", 2)]


def test_the_ranks_of_a_heavy_stage_are_no_stragglers(seen):
    assert marks(seen["pipeline with a heavy end"]) == []


def test_a_slow_rank_is_named_among_those_of_its_stage(seen):
    told = marks(seen["pipeline with a slow rank"])
    assert [(mark["check"], mark["blamed"]) for mark in told] == [("straggler", 3)]
    assert "median of its stage" in told[0]["message"]
