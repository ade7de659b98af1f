"""What is estimated before a job starts is what its ranks then hold.

Parameters, gradients and optimizer state agree to the byte. What autograd keeps agrees within `KEPT` (measured: 1 %,
and 11 % for pipelines); where parameters are gathered or cast it also keeps some of these `copies`. The peak of all
tensors of a rank agrees within `PEAK` (measured: 8 % below to 20 % above).
"""

from dataclasses import replace

import pytest
from phalanx.recipes import weights
from phalanx.recipes.catalog import read
from phalanx.recipes.devices import find
from phalanx.recipes.memory import estimate, in_flight, remedies, verdict
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.vision import Picture, Resnet, Vit
from recipe_cases import ONE, TWO, TWO_SLOW, lm, recsys
from recipe_gang import trained

KEPT, PEAK = 0.13, 0.22
EXACT = ("parameters", "gradients", "optimizer")


def estimated(case, ranks):
    return estimate(read(*case), ranks, on_gpu=False)


def assert_exact(case, measured):
    memory = estimated(case, len(measured))
    fullest = max(measured, key=lambda rank: sum(rank[part] for part in EXACT) + rank["peak"])
    assert {part: getattr(memory, part) for part in EXACT} == {part: fullest[part] for part in EXACT}


def assert_kept(case, measured):
    memory = estimated(case, len(measured))
    kept = memory.activations + memory.logits // 3  # one of the three sets of logits is kept by autograd
    if case[0] == "recsys":  # temporary, not kept: the gradient of the products
        kept -= 16 // len(measured) * 2 * (4 if memory.copies == 0 else 2) * 27**2
    most = max(rank["peak"] for rank in measured)
    assert (1 - KEPT) * most <= kept + memory.copies and kept <= (1 + KEPT) * most


@pytest.mark.parametrize("name", ONE)
def test_one_rank_holds_what_was_estimated(name):
    assert_exact(ONE[name], trained(ONE, ranks=1)[name])


@pytest.mark.parametrize("name", ONE)
def test_the_peak_of_all_tensors_is_near_the_estimate(name):
    (measured,) = trained(ONE, ranks=1)[name]
    assert estimated(ONE[name], 1).total == pytest.approx(measured["peak"], rel=PEAK)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_hold_and_keep_what_was_estimated(name):
    measured = trained(TWO, ranks=2)[name]
    assert_exact(TWO[name], measured)
    if "accumulated" not in name:
        assert_kept(TWO[name], measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_SLOW)
def test_two_ranks_in_all_layouts_hold_and_keep_what_was_estimated(name):
    measured = trained(TWO_SLOW, ranks=2)[name]
    assert_exact(TWO_SLOW[name], measured)
    if "recomputed" not in name:  # of these the hook sees only what waits
        assert_kept(TWO_SLOW[name], measured)


def test_the_models_are_counted_as_they_say_themselves():
    config = read(*lm())
    model = weights.lm(config.model)
    assert weights.count((*model.first, *model.last, *sum(model.blocks, ()))) == config.model.parameters
    clicks = read(*recsys()).model
    assert weights.count(weights.recsys_dense(clicks)) == clicks.dense_parameters
    assert weights.recsys_tables(clicks).count == clicks.table_parameters
    photograph = Picture(channels=3, size=224)
    small = weights.vit(Vit(), photograph, 1000)
    assert weights.count((*small.first, *small.last, *sum(small.blocks, ()))) == Vit().parameters(photograph, 1000)
    fifty = weights.resnet(Resnet(depths=(3, 4, 6, 3), bottleneck=True), photograph, 1000)
    assert (
        weights.count((*fifty.first, *fifty.last, *sum(fifty.blocks, ()))) == 25_557_032
    )  # as torchvision's ResNet-50


LLAMA_8B = {"vocabulary": 128_256, "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14_336}


def large(**sections):
    data = {"paths": ["unread"], "seq_len": 8192, "format": "tokens"}
    train = {"global_batch": 64, "accumulate": 1}
    base = {"data": data, "model": LLAMA_8B, "train": train, "precision": {"compute": "bf16"}}
    return read("lm", {**base, **sections})


def test_each_technique_needs_less_than_the_one_before_it():
    layouts = [
        {},
        {"shard": 8},
        {"shard": 8, "recompute": "selective"},
        {"shard": 8, "recompute": "full"},
        {"shard": 32, "data": 2, "recompute": "full"},
    ]
    totals = [estimate(large(parallel=parallel), 64).total for parallel in layouts]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_the_parts_of_a_sharded_model_of_eight_billion():
    memory = estimate(large(parallel={"shard": 64}), 64)
    assert memory.parameters == memory.gradients == pytest.approx(4 * 8.03e9 / 64, rel=0.01)
    assert memory.optimizer == 2 * memory.parameters
    assert memory.logits == 3 * 4 * 8192 * 128_256


def test_a_verdict_says_what_would_fit():
    h100 = find("h100")
    assert verdict(large(parallel={"shard": 64, "recompute": "full"}), 64, h100).startswith("fits on h100-80gb: 2")
    said = verdict(large(), 64, h100)
    assert said.startswith("does not fit on h100-80gb: needs ")
    assert "; use parallel.shard = " in said
    assert verdict(large(), 1, h100).endswith("and no switch helps; use more ranks")


def test_every_remedy_that_is_named_can_be_run_and_needs_less_where_it_shards():
    config = large()
    for _, other in remedies(config, 64):
        assert estimate(other, 64).total < estimate(config, 64).total


def test_offloaded_state_does_not_lie_on_the_device():
    memory = estimate(large(parallel={"shard": 64, "offload": True}), 64)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (0, 0, 0) and memory.copies > 0


@pytest.mark.parametrize(
    ("schedule", "waiting"), [("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 3, 2, 1]), ("interleaved", [11, 9, 7, 5])]
)
def test_as_many_microbatches_wait_as_the_schedule_starts_before_their_backward(schedule, waiting):
    parallel = Parallel(data=1, pipeline=4, microbatches=8, schedule=schedule)
    assert [in_flight(parallel, rank) for rank in range(4)] == waiting
    assert in_flight(replace(parallel, pipeline=1), 0) == 1
