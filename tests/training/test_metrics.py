"""What is measured of a step, and how the ranks compare."""

import pytest
import torch
from fault_gang import case, outcomes
from phalanx.recipes.lm import LmModel
from phalanx_worker.training.metrics.spread import Spread, Times
from phalanx_worker.training.metrics.totals import Totals
from phalanx_worker.training.metrics.work import count_work, peak_flops
from phalanx_worker.training.recipes.lm import lm_task

QUIET = {"straggler": {"action": "off"}, "spike": {"action": "off"}}
SLEEP_S = 0.03
SLOW = {"slow": {"batches": list(range(99)), "ranks": [1], "seconds": SLEEP_S}}
SPLIT = ("compute_s", "comm_s", "data_wait_s", "checkpoint_s", "other_s")

CASES = {
    "DDP": case(health=QUIET, faults=SLOW, keeps_every=5),
    "FSDP": case(health=QUIET, faults=SLOW, parallel={"shard": 2}),
    "tensor": case(health=QUIET, parallel={"tensor": 2}),
    "pipeline": case(health=QUIET, parallel={"pipeline": 2}),
}


@pytest.fixture(scope="module")
def reports():
    """Of rank 0."""
    seen = outcomes(CASES, ranks=2)
    assert not [mark for outcome in seen.values() for rank in outcome for mark in rank["marks"]]
    assert not [rank["reports"] for outcome in seen.values() for rank in outcome[1:] if rank["reports"]]
    return {name: outcome[0]["reports"] for name, outcome in seen.items()}


@pytest.mark.parametrize("layout", CASES)
def test_every_layout_reports_what_explains_its_speed(reports, layout):
    first, last = reports[layout][2], reports[layout][-1]
    every = {"step", "total_steps", "loss", "grad_norm", "lr", "step_time_s", "data_wait_s", "compute_s", "comm_s"}
    assert every | {"tokens_per_s", "samples_per_s"} <= set(first)
    now_and_then = {"productive_s", "lost_s", "data_wait_total_s", "checkpoint_total_s", "tokens_total", "mfu"}
    assert now_and_then | {"step_time_max_s", "compute_median_s", "comm_min_s", "slowest_rank"} <= set(last)
    assert last["tokens_total"] == 24 * 16 * 16
    assert 0 < last["mfu"] < 1
    assert all(one["comm_s"] > 0 for one in reports[layout][2:])


def test_the_size_of_the_model_is_told_once(reports):
    told = [one["parameters"] for one in reports["DDP"] if "parameters" in one]
    assert told == [LmModel(vocabulary=64, layers=2, width=32, heads=4, kv_heads=2, hidden=64).parameters]


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_a_rank_that_waits_for_a_slow_one_shows_it_as_communication(reports, layout):
    waits = sorted(one["comm_s"] for one in reports[layout][4:])
    assert waits[len(waits) // 2] > 0.8 * SLEEP_S
    full = [one for one in reports[layout] if "slowest_rank" in one]
    assert full[-1]["slowest_rank"] == 1
    assert full[-1]["compute_max_s"] > SLEEP_S
    assert full[-1]["comm_max_s"] > full[-1]["comm_min_s"]


def test_a_step_is_not_longer_than_its_parts(reports):
    for one in reports["DDP"]:
        assert one["compute_s"] + one["comm_s"] + one["data_wait_s"] == pytest.approx(one["step_time_s"], rel=1e-3)


def test_the_time_of_checkpoints_adds_up(reports):
    last = reports["DDP"][-1]
    assert 0 < last["checkpoint_total_s"] < last["productive_s"]


def test_time_in_steps_counts_until_it_is_rolled_back():
    totals = Totals()
    for step in range(1, 7):
        totals.step(work_s=2.0, data_wait_s=0.5, counts=step != 2)
        if step in (3, 5):
            totals.kept(step, 0.25)
    assert (totals.productive_s, totals.lost_s) == (10.0, 2.0)
    totals.went_back(5)
    assert (totals.productive_s, totals.lost_s) == (8.0, 4.0)
    totals.went_back(3)
    assert (totals.productive_s, totals.lost_s, totals.data_wait_s, totals.checkpoint_s) == (4.0, 8.0, 3.0, 0.5)


def test_the_ranks_are_compared_by_their_own_work():
    ranks = (
        Times(step_time_s=1.0, compute_s=0.2, comm_s=0.8),
        Times(step_time_s=1.0, compute_s=0.5, comm_s=0.2, data_wait_s=0.3),
        Times(step_time_s=1.0, compute_s=0.6, comm_s=0.4),
    )
    told = Spread(ranks, steps=10).metrics()
    assert (told["slowest_rank"], told["own_work_max_s"]) == (1, 0.8)
    assert (told["compute_min_s"], told["compute_median_s"], told["compute_max_s"]) == (0.2, 0.5, 0.6)
    assert "gpu_memory_max_bytes" not in told


def test_work_is_six_operations_per_parameter_and_token_plus_attention():
    shape = LmModel(vocabulary=128, layers=3, width=64, heads=4, kv_heads=2, hidden=96)
    batch, length = 8, 32
    work = count_work(lm_task(shape), {"tokens": torch.zeros(batch, length + 1, dtype=torch.int64)})
    assert work.parameters == shape.parameters
    products = shape.parameters - shape.vocabulary * shape.width - (2 * shape.layers + 1) * shape.width
    attention = 12 * shape.layers * shape.width * length  # Chowdhery et al. 2022, appendix B
    assert work.flops == pytest.approx((6 * products + attention) * batch * length, rel=0.01)


def test_a_cpu_has_a_peak_that_is_measured_once():
    device = torch.device("cpu")
    assert 1e8 < peak_flops(device, "fp32") < 1e13
    assert peak_flops(device, "fp32") == peak_flops(device, "fp32")
