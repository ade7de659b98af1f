"""The examples, as far as they can be tried without a Phalanx: what the demo makes of its job, where ranks compute."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import phalanx
import pytest
import torch
from fake_server import AT, JOB_ID, FakeServer, answer, job
from phalanx.cli import session

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ the demo


@pytest.fixture
def demo(wired: FakeServer, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo with the fake server as its Phalanx; following the job ends well."""
    module = load("demo.py")
    monkeypatch.setattr(module.subprocess, "run", lambda argv: subprocess.CompletedProcess(argv, 0))
    monkeypatch.setattr(phalanx, "Client", session.make_client)
    return module


def measured(server: FakeServer, *means: Any, state: str = "succeeded") -> None:
    points = [{"at": AT, "mean": mean} for mean in means]
    series = [{"name": "loss", "points": points}] if means else []
    server.on("GET /v1/jobs", answer({"items": [job(state)], "next_cursor": None}))
    server.on(f"GET /v1/jobs/{JOB_ID}/metrics", answer({"series": series}))


def test_a_demo_that_learned_is_a_success(demo: ModuleType, wired: FakeServer, capsys: pytest.CaptureFixture) -> None:
    measured(wired, 5.5, 3.25, 2.5)
    assert demo.main() == 0
    assert "phalanx up --data .phalanx/demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("means", "state", "said"),
    [
        ([2.5, 2.5], "succeeded", "succeeded, loss 2.500 -> 2.500"),
        ([5.5, "nan"], "succeeded", "succeeded, loss 5.500 -> nan"),
        ([5.5, None], "succeeded", "succeeded, loss 5.500 -> nan"),
        (["inf", 2.5], "succeeded", "succeeded, loss inf -> 2.500"),
        ([], "succeeded", "succeeded, loss nan -> nan"),
        ([5.5, 2.5], "failed", "failed, loss 5.500 -> 2.500"),
    ],
    ids=["did not fall", "not finite", "null", "not finite at first", "not reported", "failed"],
)
def test_a_demo_that_failed_says_why(
    demo: ModuleType, wired: FakeServer, capsys: pytest.CaptureFixture, means: list, state: str, said: str
) -> None:
    measured(wired, *means, state=state)
    assert demo.main() == 1
    assert capsys.readouterr().err == f"the demo failed: {JOB_ID} {said}\n"


def test_a_demo_whose_job_failed_ends_as_its_following_did(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda argv: subprocess.CompletedProcess(argv, 6))
    assert demo.main() == 6


# ------------------------------------------------------------------ where ranks compute


@pytest.mark.parametrize("path", ["lm/train.py", "torchrun/train.py"])
@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda:1"), (8, "cuda:1")])
def test_a_rank_has_a_gpu_where_every_rank_of_its_node_has(
    monkeypatch: pytest.MonkeyPatch, path: str, gpus: int, device: str
) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(load(path).own_device()) == device
    assert chosen == ([device] if gpus > 1 else [])
