"""One seed and one global batch give one loss curve, whatever the layout: on 2 ranks, 4 (slow) and 8 (full).

Every step's loss is within `LOSS` of a single rank's, relatively, and the gradient norm before clipping within `NORM`:
in fp32 nothing differs but the order of sums (measured: 2e-7 and 2e-6). Clipping is on in every step, so a wrong norm
would show in the next loss.
"""

import pytest
from layout_cases import FAST, INTERLEAVED, LAYOUTS, ONE, PIPELINE
from training_gang import case

LOSS = 2e-6
NORM = 2e-5

DEEP = {"layers": 8}

FOUR = {
    "DDP": case(parallel={"data": 4}),
    "FSDP2": case(parallel={"shard": 4}),
    "hybrid sharding": case(parallel={"data": 2, "shard": 2}),
    "hybrid sharding, gradients accumulated": case(parallel={"data": 2, "shard": 2}, train={"accumulate": 2}),
    "tensor": case(parallel={"tensor": 4}),
    "pipeline, GPipe": case(parallel={"pipeline": 4, "schedule": "gpipe", "microbatches": 4}),
    "pipeline, 1F1B": case(parallel={"pipeline": 4, "microbatches": 4}),
    "pipeline, interleaved": case(model=DEEP, parallel={**INTERLEAVED, "pipeline": 4}),
    "data × tensor": case(parallel={"data": 2, "tensor": 2}),
    "shard × tensor": case(parallel={"shard": 2, "tensor": 2}),
    "data × pipeline": case(parallel={"data": 2, **PIPELINE}),
    "data × pipeline, interleaved": case(parallel={"data": 2, **INTERLEAVED}),
    "shard × pipeline": case(parallel={"shard": 2, **PIPELINE}),
    "shard × pipeline, interleaved": case(parallel={"shard": 2, **INTERLEAVED}),
    "tensor × pipeline": case(parallel={"tensor": 2, **PIPELINE}),
    "context": case(parallel={"context": 4}),
    "data × context": case(parallel={"data": 2, "context": 2}),
    "shard × context": case(parallel={"shard": 2, "context": 2}),
    "tensor × context": case(parallel={"tensor": 2, "context": 2}),
    "pipeline × context": case(parallel={**PIPELINE, "context": 2}),
}

LARGE = {"layers": 16, "kv_heads": 8}

EIGHT = {
    "DDP": case(model=DEEP, parallel={"data": 8}),
    "DDP, accumulated": case(model=DEEP, parallel={"data": 8}, train={"accumulate": 2}),
    "FSDP2": case(model=DEEP, parallel={"shard": 8}),
    "hybrid sharding": case(model=DEEP, parallel={"data": 2, "shard": 4}),
    "pipeline, 1F1B": case(model=DEEP, parallel={"pipeline": 8, "microbatches": 8}),
    "pipeline, GPipe": case(model=DEEP, parallel={"pipeline": 8, "microbatches": 16, "schedule": "gpipe"}),
    "data × pipeline, interleaved": case(
        model=DEEP, parallel={"data": 2, "pipeline": 4, "microbatches": 4, "schedule": "interleaved"}
    ),
    "pipeline, interleaved": case(model=LARGE, parallel={**INTERLEAVED, "pipeline": 8, "microbatches": 8}),
    "tensor": case(model=LARGE, parallel={"tensor": 8}),
    "context": case(model=LARGE, parallel={"context": 8}),
    "data × tensor": case(model=DEEP, parallel={"data": 2, "tensor": 4}),
    "data × pipeline": case(model=DEEP, parallel={"data": 2, "pipeline": 4, "microbatches": 4}),
    "shard × pipeline": case(model=DEEP, parallel={"shard": 2, "pipeline": 4, "microbatches": 4}),
    "shard × tensor": case(model=DEEP, parallel={"shard": 4, "tensor": 2}),
    "tensor × pipeline": case(model=DEEP, parallel={"tensor": 2, "pipeline": 4, "microbatches": 4}),
    "data × shard × tensor": case(model=DEEP, parallel={"data": 2, "shard": 2, "tensor": 2}),
    "data × shard × pipeline": case(model=DEEP, parallel={"data": 2, "shard": 2, **PIPELINE}),
    "data × tensor × pipeline": case(model=DEEP, parallel={"data": 2, "tensor": 2, **PIPELINE}),
    "shard × tensor × pipeline": case(model=DEEP, parallel={"shard": 2, "tensor": 2, **PIPELINE}),
    "shard × tensor × pipeline, interleaved": case(model=DEEP, parallel={"shard": 2, "tensor": 2, **INTERLEAVED}),
    "data × shard × context": case(model=DEEP, parallel={"data": 2, "shard": 2, "context": 2}),
    "data × tensor × context": case(model=DEEP, parallel={"data": 2, "tensor": 2, "context": 2}),
    "data × pipeline × context": case(model=DEEP, parallel={"data": 2, "context": 2, **PIPELINE}),
    "shard × tensor × context": case(model=DEEP, parallel={"shard": 2, "tensor": 2, "context": 2}),
    "shard × pipeline × context": case(model=DEEP, parallel={"shard": 2, "context": 2, **PIPELINE}),
    "tensor × pipeline × context": case(model=DEEP, parallel={"tensor": 2, "context": 2, **PIPELINE}),
}


def one_rank(computed, given):
    """The curve of the same model on one rank."""
    return computed({"one rank": case(model=given["model"])}, ranks=1)["one rank"]


def assert_same(curve, one):
    assert curve["loss"] == pytest.approx(one["loss"], rel=LOSS)
    assert curve["grad_norm"] == pytest.approx(one["grad_norm"], rel=NORM)
    assert curve["held_out"] is None or curve["held_out"] == pytest.approx(one["held_out"], rel=LOSS)


def test_a_single_rank_learns(computed):
    (one,) = computed(ONE, ranks=1).values()
    assert one["loss"][-1] < one["loss"][0] - 0.2
    assert min(one["grad_norm"]) > 0.5, "clipping at 0.5 acts in every step"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one_does(computed, layout):
    assert_same(computed(FAST, ranks=2)[layout], computed(ONE, ranks=1)["one rank"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_train_as_one_does(computed, layout):
    assert_same(computed(FOUR, ranks=4)[layout], one_rank(computed, FOUR[layout]))


@pytest.mark.full
@pytest.mark.parametrize("layout", EIGHT)
def test_eight_ranks_train_as_one_does(computed, layout):
    assert_same(computed(EIGHT, ranks=8)[layout], one_rank(computed, EIGHT[layout]))


def test_what_is_held_out_is_tried_in_every_layout_but_a_pipeline(computed):
    without = {name for name, curve in computed(FAST, ranks=2).items() if curve.get("held_out") is None}
    assert without and all("pipeline" in name for name in without), without


def test_ranks_hold_their_part_of_the_parameters(computed):
    whole = computed(FAST, ranks=2)["DDP"]["own_bytes"][0]
    for layout in ("FSDP2", "tensor", "pipeline, 1F1B"):
        own = computed(FAST, ranks=2)[layout]["own_bytes"]
        assert max(own) < 0.52 * whole, layout
