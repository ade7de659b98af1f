"""What only a real GPU can show of a training: bf16 and FP8 by its own units, NCCL, memory, pinned batches, and that a
step waits for nothing after its ranks have agreed."""

import json
from functools import partial

import phalanx
import pytest
import torch
from phalanx import job
from phalanx_worker.training import loop
from phalanx_worker.training.data.stream import Stream
from phalanx_worker.training.main import run
from phalanx_worker.training.parallel.context import _end_of
from torch.nn.functional import scaled_dot_product_attention as attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
TRAIN = {"steps": 60, "global_batch": 16, "seed": 3}
TEXT = "the quick brown fox jumps over the lazy dog. " * 400
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


class Told:
    """What a training says of itself."""

    def __init__(self, monkeypatch):
        self.notes, self.reports = [], []
        monkeypatch.setattr(phalanx, "report", lambda **values: self.reports.append(values))
        monkeypatch.setattr(job, "mark", lambda kind, **data: self.notes.append(data["message"]))

    def all(self, name):
        return [values[name] for values in self.reports if name in values]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """What a small model says when it is trained with these sections."""
    (tmp_path / "text.txt").write_text(TEXT)

    def train(**sections):
        told = Told(monkeypatch)
        args = {
            "data": {"paths": [str(tmp_path / "text.txt")], "seq_len": 128, "cache": str(tmp_path / "cache")},
            "model": {"layers": 4, "width": 256, "heads": 8, "kv_heads": 2},
            "train": TRAIN,
            "optim": {"lr": 3e-3},
            "checkpoint": {"every_steps": 0},
            "device": "cuda",
        }
        assert run(["lm", json.dumps(args | sections)]) == 0
        return told

    return train


def test_bf16_learns_as_fp32_does_and_tells_what_the_gpu_did(trained):
    exact, told = trained(), trained(precision={"compute": "bf16"})
    assert told.all("loss")[0] == pytest.approx(exact.all("loss")[0], rel=1e-2)  # later a few steps make a difference
    assert all(outcome.all("loss")[-1] < 1 for outcome in (exact, told))
    assert told.all("mfu") and all(0 < share < 1 for share in told.all("mfu"))
    assert told.all("gpu_memory_max_bytes")[-1] > 0
    assert 0 <= max(told.all("gpu_utilization_max"), default=0) <= 1
    assert "of GPU memory at most" in told.notes[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_waits_for_nothing_after_its_ranks_have_agreed(trained, monkeypatch):
    """torch raises where anything waits for the GPU between the update and the end of the step."""
    update, facts = loop._update, loop.Facts
    strict = []  # how each step was looked at until its end: 2 is to raise

    def strictly(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        return update(*args, **kwargs)

    def leniently(*args, **kwargs):
        strict.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        return facts(*args, **kwargs)

    monkeypatch.setattr(loop, "_update", strictly)
    monkeypatch.setattr(loop, "Facts", leniently)
    try:
        trained(precision={"compute": "bf16"})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict == [2] * TRAIN["steps"]


@pytest.mark.parametrize("parallel", [{}, {"offload": True}], ids=["on the GPU", "offloaded"])
def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(trained, tmp_path, monkeypatch, parallel):
    sections = {"parallel": parallel, "precision": {"compute": "bf16"}}
    whole = trained(**sections)
    kept = sections | {"checkpoint": {"url": str(tmp_path / "kept"), "every_steps": 20}}
    asked = iter([*[False] * 29, *[True] * 9])
    with monkeypatch.context() as stopped:
        stopped.setattr(phalanx, "should_stop", lambda: next(asked))
        trained(**kept)
    rest = trained(**kept)
    assert rest.reports[0]["step"] == 31
    assert rest.all("loss")[-1] == pytest.approx(whole.all("loss")[-1], abs=0.05)


def pinned(batch):
    assert all(tensor.is_pinned() for tensor in batch.values())
    return batch


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_end_of_a_sequence_sees_all_of_it_and_nothing_behind(precision, key_heads):
    draw = partial(torch.randn, device="cuda", dtype=precision, requires_grad=True)
    query, key, value = draw(2, 8, 64, 64), draw(2, key_heads, 512, 64), draw(2, key_heads, 512, 64)
    seen = torch.ones(64, 256, dtype=torch.bool, device="cuda").tril(192)
    sides = (
        _end_of((query, 256), key, value),
        attention(query, key[:, :, :256], value[:, :, :256], attn_mask=seen, enable_gqa=key_heads < 8),
    )
    torch.testing.assert_close(*sides, rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad(side.float().square().sum(), (query, key, value)) for side in sides]
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    "sections",
    [
        {"precision": {"compute": "fp16"}},
        {"precision": {"compute": "bf16"}, "parallel": {"recompute": "selective"}},
        {"precision": {"compute": "bf16"}, "data": {"workers": 2}},
        {"optim": {"name": "adafactor", "lr": 3e-2}},
        {"optim": {"name": "lamb", "lr": 3e-2}},
        pytest.param(
            {"precision": {"compute": "fp8"}}, marks=pytest.mark.skipif(not HAS_FP8, reason="a GPU without FP8")
        ),
    ],
    ids=["fp16", "recomputed", "workers", "adafactor", "lamb", "fp8"],
)
def test_it_learns_with(trained, sections, tmp_path, monkeypatch):
    if "data" in sections:
        place = Stream._placed
        monkeypatch.setattr(Stream, "_placed", lambda self, batch: place(self, pinned(batch)))
        paths = {"paths": [str(tmp_path / "text.txt")], "seq_len": 128, "cache": str(tmp_path / "cache")}
        sections = sections | {"data": paths | sections["data"]}
    losses = trained(**sections).all("loss")
    assert losses[-1] < losses[0] - 1, losses
