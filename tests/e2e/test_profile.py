"""A trace of a plain torchrun script, asked for while it trains, on a real local Ray."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import phalanx
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

END_S = 120.0
STEPS = 4
STEP_NAMES = [f"ProfilerStep#{number}" for number in range(1, STEPS + 1)]
TRAIN = """
import os, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 4)))
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
stop = torch.zeros(1)
while not stop:
    optimizer.zero_grad()
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    schedule.step()
    stop += pathlib.Path(os.environ["PHALANX_CHECKPOINT_DIR"], "stop").exists()
    dist.all_reduce(stop)
print("trained")
"""


def events_of(file: Path) -> list[dict]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def test_a_plain_script_is_profiled_while_it_trains(up, client: phalanx.Client, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(TRAIN)
    resources = {"replicas": 2, "gpus_per_replica": 1}
    document = {"name": "plain", "tenant": "default", "resources": resources}
    document |= {"run": {"command": "python train.py"}, "checkpoint": {"url": str(tmp_path / "checkpoints")}}
    job = client.submit(document, workdir=tmp_path / "code")
    deadline = time.monotonic() + END_S
    while client.job(job.id).state != "running":
        assert time.monotonic() < deadline, client.job(job.id).message
        time.sleep(0.1)
    asked = ["--steps", str(STEPS), "--rank", "0", "--rank", "1", "--to", str(tmp_path / "traces"), "--timeout", "60"]
    said = up.cli("profile", job.id, *asked, check=False)
    assert said.returncode == 0, (said.stderr, client.logs(job.id), client.profiles(job.id))
    assert "ui.perfetto.dev" in said.stderr
    assert client.job(job.id).state == "running"
    files = [Path(line) for line in said.stdout.split()]
    assert len(files) == 2
    for rank, file in enumerate(files):
        assert file.name.endswith(f"-rank-{rank}.json.gz")
        events = events_of(file)
        names = [event["name"] for event in events if event.get("ph") == "X"]
        assert [name for name in names if name.startswith("ProfilerStep#")] == STEP_NAMES
        assert any(name.startswith("aten::") for name in names)
        assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == STEPS
        assert_nested([event for event in events if event.get("cat") == "user_annotation"])
    (profile,) = client.profiles(job.id)
    assert (profile.state, profile.steps, [rank.state for rank in profile.ranks]) == ("ready", STEPS, ["ready"] * 2)
    (tmp_path / "checkpoints" / "stop").touch()
    job = client.wait(job.id, timeout_s=END_S)
    assert job.state == "succeeded", client.logs(job.id)
    assert "trained" in client.logs(job.id)
    assert list(client.outputs(job.id)) == []


def assert_nested(events: list[dict]) -> None:
    """Ranges of one thread lie in each other or apart: viewers drop what overlaps."""
    for first in events:
        for second in events:
            begins = first["ts"] < second["ts"] < first["ts"] + first["dur"]
            if begins and (first["pid"], first["tid"]) == (second["pid"], second["tid"]):
                assert second["ts"] + second["dur"] <= first["ts"] + first["dur"], (first, second)
