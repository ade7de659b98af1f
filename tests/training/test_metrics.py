"""What is measured of a step, and how the ranks compare."""

from dataclasses import dataclass
from statistics import median

import pytest
import torch
from fault_gang import case, outcomes
from phalanx.recipes.lm import LmModel
from phalanx_worker.training.metrics import meter
from phalanx_worker.training.metrics.spread import Spread, Times
from phalanx_worker.training.metrics.totals import Totals
from phalanx_worker.training.metrics.work import count_work, peak_flops
from phalanx_worker.training.recipes.lm import lm_task

QUIET = {"straggler": {"action": "off"}, "spike": {"action": "off"}}
SLEEP_S = 0.03
SLOW = {"slow": {"batches": list(range(99)), "ranks": [1], "seconds": SLEEP_S}}
LOADER_S, BESIDE_S = 0.02, 0.01
LATE = {"loader": {"batches": [1, 7, 8], "seconds": LOADER_S}, "beside": {"batches": [9, 10], "seconds": BESIDE_S}}

CASES = {
    "DDP": case(health=QUIET, faults=SLOW, keeps_every=5),
    "FSDP": case(health=QUIET, faults=SLOW, parallel={"shard": 2}),
    "tensor": case(health=QUIET, parallel={"tensor": 2}),
    "pipeline": case(health=QUIET, parallel={"pipeline": 2}),
    "late": case(health=QUIET, faults=LATE, keeps_every=5, to_files=True),
}


@dataclass
class Facts:
    step_time_s: float
    data_wait_s: float
    updated: bool = True


@pytest.fixture(scope="module")
def reports():
    """Of rank 0."""
    seen = outcomes(CASES, ranks=2)
    assert not [mark for outcome in seen.values() for rank in outcome for mark in rank["marks"]]
    assert not [rank["reports"] for outcome in seen.values() for rank in outcome[1:] if rank["reports"]]
    return {name: outcome[0]["reports"] for name, outcome in seen.items()}


def steps(reports):
    """Those of a step, without the last word of the totals."""
    return [one for one in reports if "loss" in one]


@pytest.mark.parametrize("layout", CASES)
def test_every_layout_reports_what_explains_its_speed(reports, layout):
    first, last = steps(reports[layout])[2], steps(reports[layout])[-1]
    every = {"step", "total_steps", "loss", "grad_norm", "lr", "step_time_s", "data_wait_s", "compute_s", "comm_s"}
    assert every | {"tokens_per_s", "samples_per_s", "checkpoint_s", "other_s"} <= set(first)
    now_and_then = {"productive_s", "lost_s", "data_wait_total_s", "checkpoint_total_s", "tokens_total", "mfu"}
    assert now_and_then | {"step_time_max_s", "compute_median_s", "comm_max_rank", "slowest_rank"} <= set(last)
    assert last["tokens_total"] == 24 * 16 * 16
    assert 0 < last["mfu"] < 1
    assert all(one["comm_s"] > 0 for one in steps(reports[layout])[2:])


def test_the_size_of_the_model_is_told_once(reports):
    told = [one["parameters"] for one in reports["DDP"] if "parameters" in one]
    assert told == [LmModel(vocabulary=64, layers=2, width=32, heads=4, kv_heads=2, hidden=64).parameters]


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_a_rank_that_waits_for_a_slow_one_shows_it_as_communication(reports, layout):
    waits = sorted(one["comm_s"] for one in steps(reports[layout])[4:])
    assert waits[len(waits) // 2] > 0.8 * SLEEP_S
    full = [one for one in reports[layout] if "slowest_rank" in one]
    assert (full[-1]["slowest_rank"], full[-1]["compute_max_rank"]) == (1, 1)
    assert full[-1]["compute_max_s"] > SLEEP_S
    assert full[-1]["comm_max_s"] > full[-1]["comm_min_s"]


def test_a_step_is_not_longer_than_its_parts(reports):
    for one in steps(reports["DDP"]):
        assert one["compute_s"] + one["comm_s"] + one["data_wait_s"] == pytest.approx(one["step_time_s"], rel=1e-3)


def test_a_late_loader_is_waiting_for_data_and_what_comes_between_steps_is_told_with_the_next(reports):
    settled = {int(one["step"]): one for one in steps(reports["late"])[4:]}  # ranks are compared, work is counted
    for name, late, seconds in (("data_wait_s", (7, 8), LOADER_S), ("other_s", (10, 11), BESIDE_S)):
        told = {step: one[name] for step, one in settled.items()}
        assert min(told[step] for step in late) > seconds > median(told.values()), name
    assert {step for step, one in settled.items() if one["checkpoint_s"] > 0} == {6, 11, 16, 21}


def test_the_totals_are_of_all_steps_but_the_first_and_of_the_last_checkpoint_too(reports):
    last_of_steps, last = steps(reports["late"])[-1], reports["late"][-1]
    assert last["step"] == last_of_steps["step"] == 24
    told = sum(one["data_wait_s"] for one in steps(reports["late"])[1:])
    assert last["data_wait_total_s"] == pytest.approx(told), "two of the three late batches"
    assert last["checkpoint_total_s"] > last_of_steps["checkpoint_total_s"] > 0
    assert last["productive_s"] == last_of_steps["productive_s"]


def test_all_steps_since_the_last_report_are_told(monkeypatch):
    """Means of what is in them, and the sums of what came between."""
    now = iter((0.0, 10.0, 20.0, 30.0))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    one = meter.Meter(torch.device("cpu"), longest_window=100)
    one._due = 100
    told = []
    for step in range(4):
        one.before_step()
        one.waits._held_s += 0.25 * step
        one.after_step(Facts(1.0 + step, 0.5 * step))
        told += [one.since_told()] if step in (0, 3) else []
        one.after_keep(step, 2.0)
    later = Times(step_time_s=3.0, data_wait_s=1.0, comm_s=0.5, compute_s=1.5)
    assert told == [(Times(step_time_s=1.0, compute_s=1.0), 0.0, 0.0), (later, 6.0, 18.0)]


def test_a_gpu_that_does_not_tell_how_busy_it_is_ends_no_training(monkeypatch):
    """As a part of one (MIG) does not, or a container without NVML; its errors are plain exceptions."""

    def refuse(device):
        raise Exception("Not Supported")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert meter._gpu(torch.device("cuda", 0)) == {"gpu_memory_bytes": 5.0}


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
    assert (told["compute_max_rank"], told["comm_max_rank"], told["data_wait_max_rank"]) == (2, 0, 1)
    assert not [name for name in told if name.startswith("gpu")]


def test_gpus_are_compared_where_there_are_any():
    ranks = tuple(Times(gpu_utilization=use, gpu_memory_bytes=size) for use, size in ((0.9, 10), (0.5, 30), (0.7, 20)))
    told = Spread(ranks, steps=10).metrics()
    use = {"gpu_utilization_min": 0.5, "gpu_utilization_median": 0.7, "gpu_utilization_max": 0.9}
    memory = {"gpu_memory_min_bytes": 10, "gpu_memory_median_bytes": 20, "gpu_memory_max_bytes": 30}
    for name, value in {**use, **memory, "gpu_utilization_max_rank": 0, "gpu_memory_max_rank": 1}.items():
        assert told[name] == value, name


def test_work_is_six_operations_per_parameter_and_token_plus_attention():
    shape = LmModel(vocabulary=128, layers=3, width=64, heads=4, kv_heads=2, hidden=96)
    batch, length = 8, 32
    work = count_work(lm_task(shape), {"tokens": torch.zeros(batch, length + 1, dtype=torch.int64)})
    assert work.parameters == shape.parameters
    products = shape.parameters - shape.vocabulary * shape.width - (2 * shape.layers + 1) * shape.width
    attention = 12 * shape.layers * shape.width * length  # Chowdhery et al. 2022, appendix B
    assert work.flops == pytest.approx((6 * products + attention) * batch * length, rel=0.01)


@pytest.mark.parametrize(
    ("product", "precision", "matrices", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", "high", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", "high", 494.7e12),
        ("NVIDIA H100 80GB HBM3", "fp32", "highest", 66.9e12),
        ("Tesla T4", "fp32", "high", 8.1e12),
        ("AMD Instinct MI300X", "fp32", "high", 163.4e12),
        ("Tesla T4", "bf16", "high", None),
        ("a GPU that the table does not know", "bf16", "high", None),
    ],
)
def test_the_peak_is_that_of_the_format_that_matrices_are_multiplied_in(
    product, precision, matrices, peak, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: product)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matrices)
    assert peak_flops.__wrapped__(torch.device("cuda:0"), precision) == pytest.approx(peak)


def test_a_cpu_has_a_peak_that_is_measured_once():
    device = torch.device("cpu")
    assert 1e8 < peak_flops(device, "fp32") < 1e13
    assert peak_flops(device, "fp32") == peak_flops(device, "fp32")
