"""What is estimated before a job starts is what its ranks then hold.

Parameters, gradients and optimizer state agree to the byte. What autograd keeps agrees within `KEPT` (measured: 1 %,
and 11 % for pipelines); where parameters are gathered or cast it also keeps some of these `copies`. The peak of all
tensors of a rank agrees within `PEAK` (measured: 8 % below to 20 % above).
"""

import json
import time
from dataclasses import replace

import phalanx
import pytest
import torch
from memory_gang import ARGUMENTS, heard
from phalanx import job
from phalanx.recipes import memory as memory_module
from phalanx.recipes import weights
from phalanx.recipes.catalog import read
from phalanx.recipes.devices import find
from phalanx.recipes.memory import estimate, in_flight, remedies, verdict, verdicts
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.vision import Picture, Resnet, Vit
from phalanx_worker.training.checkpoint import Checkpointer
from phalanx_worker.training.main import main
from phalanx_worker.training.metrics import memory as measured_memory
from phalanx_worker.training.metrics.memory import MIB, Fullest, Peak
from recipe_cases import ONE, ONE_SLOW, TWO, TWO_SLOW, lm, recsys
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE, *ONE_SLOW])
def test_one_rank_holds_what_was_estimated(name):
    cases = ONE if name in ONE else ONE_SLOW
    assert_exact(cases[name], trained(cases, ranks=1)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE, *ONE_SLOW])
def test_the_peak_of_all_tensors_is_near_the_estimate(name):
    cases = ONE if name in ONE else ONE_SLOW
    (measured,) = trained(cases, ranks=1)[name]
    assert estimated(cases[name], 1).total == pytest.approx(measured["peak"], rel=PEAK)


@pytest.mark.slow
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


def counted(model):
    return weights.count((*model.first, *model.last)) + sum(block.count for block in model.blocks)


def test_the_models_are_counted_as_they_say_themselves():
    config = read(*lm())
    model = weights.lm(config.model)
    assert counted(model) == config.model.parameters
    clicks = read(*recsys()).model
    assert weights.count(weights.recsys_dense(clicks)) == clicks.dense_parameters
    assert weights.recsys_tables(clicks).count == clicks.table_parameters
    photograph = Picture(channels=3, size=224)
    small = weights.vit(Vit(), photograph, 1000)
    assert counted(small) == Vit().parameters(photograph, 1000)
    fifty = weights.resnet(Resnet(depths=(3, 4, 6, 3), bottleneck=True), photograph, 1000)
    assert counted(fifty) == 25_557_032  # as torchvision's ResNet-50


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


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
@pytest.mark.parametrize("layers", [16, 19, 27, 31])
@pytest.mark.parametrize("pipeline", [2, 3, 5, 8])
def test_the_ranks_that_are_looked_at_have_the_one_that_needs_most(schedule, layers, pipeline, monkeypatch):
    parallel = {"pipeline": pipeline, "schedule": schedule, "microbatches": 2 * pipeline}
    config = large(model={**LLAMA_8B, "layers": layers}, parallel=parallel, train={"global_batch": 2 * pipeline})
    found = estimate(config, pipeline)
    monkeypatch.setattr(memory_module, "_unlike_ranks", lambda layers, parallel: range(parallel.pipeline))
    assert estimate(config, pipeline) == found


DEEP = {**LLAMA_8B, "layers": 4096}


def deep_resnet():
    model = {"kind": "resnet", "resnet": {"depths": [4096] * 8}}
    return read(
        "vision", {"data": {"paths": ["unread"], "format": "images"}, "model": model, "train": {"global_batch": 64}}
    )


INTERLEAVED = {"pipeline": 64, "schedule": "interleaved", "stages_per_rank": 64, "microbatches": 64}


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        (large(model=DEEP), 64),
        (large(model=DEEP, parallel={"pipeline": 4096, "microbatches": 64}), 4096),
        (large(model=DEEP, parallel=INTERLEAVED), 64),
        (deep_resnet(), 64),
    ],
    ids=["deep", "as many stages", "interleaved", "resnet"],
)
def test_a_deep_model_costs_no_more_to_judge_than_a_flat_one(config, ranks):
    started = time.process_time()
    needed = estimate(config, ranks)
    estimated = time.process_time()
    said = verdicts(config, ranks, needed, [find("t4"), find("h100")])
    assert all(text.startswith("does not fit on") for text in said)
    assert estimated - started < 0.05
    assert time.process_time() - estimated < 0.3, "all remedies are estimated, once for all devices"


def test_the_peak_of_a_rank_on_a_cpu_is_what_its_memory_rose_by_since():
    earlier = torch.ones(64 * MIB)  # 256 MiB
    del earlier
    peak = Peak(torch.device("cpu"))
    held = torch.ones(16 * MIB)
    assert peak.bytes() == pytest.approx(held.nbytes, rel=0.1)
    del held
    assert peak.bytes() == pytest.approx(64 * MIB, rel=0.1)


def process_of(folder, peak_kb, resident_kb):
    """As /proc/self tells it."""
    (folder / "status").write_text(f"Name:\tpython\nVmHWM:\t{peak_kb:8} kB\nVmRSS:\t{resident_kb:8} kB\n")


@pytest.mark.parametrize(("peak_kb", "measured"), [(400, 0), (390, 0), (1000, 600 * 1024)])
def test_a_rank_that_needs_no_more_than_its_process_held_takes_nothing(tmp_path, monkeypatch, peak_kb, measured):
    monkeypatch.setattr(measured_memory, "PROCESS", tmp_path)
    process_of(tmp_path, 1000, 400)
    peak = Peak(torch.device("cpu"))
    assert (tmp_path / "clear_refs").read_text() == "5", "so that the peak is one since now"
    process_of(tmp_path, peak_kb, 400)
    assert peak.bytes() == measured


@pytest.mark.parametrize(("later_kb", "measured"), [(900, None), (1000, None), (1500, 1100 * 1024)])
def test_a_peak_that_an_earlier_one_may_hide_is_not_told(tmp_path, monkeypatch, later_kb, measured):
    monkeypatch.setattr(measured_memory, "PROCESS", tmp_path)
    (tmp_path / "clear_refs").mkdir()  # nothing to write to
    process_of(tmp_path, 1000, 400)
    peak = Peak(torch.device("cpu"))
    process_of(tmp_path, max(later_kb, 1000), later_kb)
    told = peak.bytes()
    assert (told == measured) if measured else (told != told)


def test_nothing_is_known_where_there_is_no_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_memory, "PROCESS", tmp_path / "none")
    told = Peak(torch.device("cpu")).bytes()
    assert told != told


def test_what_was_measured_is_said_beside_the_estimate():
    on_gpu = Fullest(rank=3, peak_bytes=812 * MIB, on_gpu=True)
    assert on_gpu.beside(790 * MIB) == ("A rank uses 812 MiB of GPU memory at most (rank 3); estimated 790 MiB (-3%).")
    on_cpu = Fullest(rank=0, peak_bytes=218 * MIB, on_gpu=False)
    assert on_cpu.beside(167 * MIB) == (
        "A rank's resident memory rose by 218 MiB at most (rank 0) from before its model was built, "
        "with libraries, mapped files and spare room; estimated 167 MiB of tensors."
    )


@pytest.fixture
def arguments(tmp_path):
    """Of a small training of four steps."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnopqrstuvwxyz " * 200)
    args = {
        "data": {"paths": [str(text)], "seq_len": 16, "cache": str(tmp_path / "cache")},
        "model": {"layers": 2, "width": 32, "heads": 4},
        "train": {"steps": 4, "global_batch": 4},
        "device": "cpu",
    }
    return ["lm", json.dumps(args)]


def test_a_recipe_says_once_how_much_memory_it_takes(arguments, monkeypatch):
    notes = []
    monkeypatch.setattr(job, "mark", lambda kind, **data: notes.append(data["message"]) if kind == "note" else None)
    assert main(arguments) == 0
    (note,) = notes
    assert "estimated" in note


def test_a_recipe_whose_memory_cannot_be_measured_says_so_and_what_was_estimated(arguments, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(measured_memory, "PROCESS", tmp_path / "none")
    monkeypatch.setattr(job, "mark", lambda kind, **data: told.update({kind: data["message"]}))
    monkeypatch.setattr(phalanx, "report", lambda **values: told.update(values))
    assert main(arguments) == 0
    assert told["note"].startswith("What a rank takes cannot be measured here; estimated ")
    assert told["memory_estimated_bytes"] > 0
    assert "memory_peak_bytes" not in told


def test_the_last_checkpoint_is_in_what_is_told_at_the_end(arguments, tmp_path, monkeypatch):
    told = []
    finish = Checkpointer.finish

    def reported(**values):
        if "memory_estimated_bytes" in values:
            told.append(values["step"])

    def finished(checkpointer):
        finish(checkpointer)
        told.append("checkpoint")

    monkeypatch.setattr(phalanx, "report", reported)
    monkeypatch.setattr(Checkpointer, "finish", finished)
    assert main([*arguments, f"checkpoint.url={tmp_path}/checkpoints"]) == 0
    assert told == [2, "checkpoint", 4]


@pytest.mark.slow
def test_two_ranks_tell_the_most_that_either_takes_and_it_is_near_the_estimate():
    first, second = heard()
    assert (second["notes"], second["reports"]) == ([], [])
    (note,) = first["notes"]
    early, last = first["reports"]
    assert (early["step"], last["step"]) == (2, 4)
    assert early["memory_estimated_bytes"] == estimated(["lm", ARGUMENTS], 2).total
    assert f"(rank {early['memory_peak_rank']:.0f})" in note
    assert 0.9 < early["memory_peak_bytes"] / early["memory_estimated_bytes"] < 1.7, "60 MiB are libraries and spare"
    assert last["memory_peak_bytes"] >= early["memory_peak_bytes"]
