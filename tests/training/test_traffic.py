"""What each technique puts on the wire in a step, to the byte: as many as its source says, and all of them counted."""

from math import prod
from statistics import median

import pytest
from exchange_gang import COUNTED, EXACT_STEPS, exchanged
from phalanx.recipes import weights
from phalanx.recipes.catalog import read
from phalanx.recipes.lm import LmModel
from phalanx.recipes.memory import estimate
from training_gang import MODEL

pytestmark = pytest.mark.slow

AGREED = 20  # the loop's own five numbers, in every step
FP32 = 4
SHAPE = LmModel(**MODEL)
WHOLE = FP32 * SHAPE.parameters


@pytest.fixture(scope="module")
def sent():
    """Of rank 0, the bytes of each step after the first by operation; both ranks put in as much."""
    seen = {name: exchanged()[name] for name in COUNTED}
    assert all(first == second for first, second in seen.values())
    return {name: ranks[0]["sent"] for name, ranks in seen.items()}


def shapes():
    model = weights.lm(SHAPE)
    blocks = [weight for block in model.blocks for weight in block.unit * block.times]
    return [weight.shape for weight in (*model.first, *blocks, *model.last)]


def usual(steps, operation):
    """Bytes of most steps: now and then the monitor compares the ranks."""
    return median(step.get(operation, 0) for step in steps)


@pytest.mark.parametrize("name", ["DDP", "DDP, one bucket", "DDP, accumulated", "bf16"])
def test_replicas_put_each_gradient_in_once_a_step(sent, name):
    assert usual(sent[name], "allreduce_") == WHOLE + AGREED


def test_compressed_gradients_are_counted_as_they_are_sent(sent):
    assert usual(sent["fp16 hook"], "allreduce_") == WHOLE // 2 + AGREED


@pytest.mark.parametrize("name", ["PowerSGD", "PowerSGD, small buckets"])
def test_powersgd_puts_in_two_thin_factors_of_each_matrix_that_is_larger_than_they_are(sent, name):
    rank, expected = 4, AGREED
    for shape in shapes():
        rows, columns = shape[0], prod(shape[1:])
        factors = (rows + columns) * min(rank, rows, columns)
        expected += FP32 * (factors if len(shape) > 1 and factors < rows * columns else rows * columns)
    steps = [step["allreduce_"] for step in sent[name]]
    assert steps[: EXACT_STEPS - 1] == [WHOLE + AGREED] * (EXACT_STEPS - 1)
    assert steps[EXACT_STEPS:] == [expected] * len(steps[EXACT_STEPS:])


def test_what_powersgd_leaves_out_is_in_the_estimate_of_memory():
    estimated = {name: estimate(read("lm", COUNTED[name]), 2, on_gpu=False) for name in ("DDP", "PowerSGD")}
    (left_out, _) = (rank["left_out"] for rank in exchanged()["PowerSGD"])
    assert estimated["PowerSGD"].total - estimated["DDP"].total == left_out == WHOLE


def test_diloco_puts_parameters_in_when_replicas_meet_and_nothing_between(sent):
    steps = [step["allreduce_"] - AGREED for step in sent["DiLoCo"]]
    assert steps == [WHOLE if number % 2 == 0 else 0 for number in range(2, len(steps) + 2)]


@pytest.mark.parametrize(("name", "gathered"), [("FSDP2", FP32), ("FSDP2, bf16", 2)])
def test_shards_are_gathered_for_forward_and_backward_and_gradients_scattered_once(sent, name, gathered):
    assert usual(sent[name], "_allgather_base_") == 2 * gathered * SHAPE.parameters / 2
    assert usual(sent[name], "_reduce_scatter_base_") == FP32 * SHAPE.parameters
