"""The examples, as far as they can be tried without a Phalanx: what the demo makes of its job, where ranks compute, and
that every job that is shown is one that the server takes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import phalanx
import pytest
import torch
from fake_server import AT, JOB_ID, FakeServer, answer, job
from phalanx import jobfile
from phalanx.cli import session
from phalanx_server.domain.spec import parse_job

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = (EXAMPLES.parent / "docs" / "training.md").read_text()


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


# ------------------------------------------------------------------ what the server takes


def techniques() -> dict[str, str]:
    """ "The line" of each technique, from the table in the documentation of training."""
    _, table = TRAINING.split("| technique | when | the line |\n|---|---|---|\n")
    rows = [row.strip("| ").split(" | ") for row in table.split("\n\n")[0].splitlines()]
    return {name: cell.split("`")[1] for name, _, cell in rows}


TECHNIQUES = techniques()
GPUS = {"hybrid sharding": 32}  # else 8


def taken(directory: Path, text: str) -> None:
    """The job file is read as a user's is, and taken as the server does; raises what it says otherwise."""
    path = directory / "job.yaml"
    path.write_text(text)
    parse_job(jobfile.read(path).document)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/job.yaml")), ids=lambda path: path.parent.name)
def test_the_job_of_an_example_is_taken(path: Path) -> None:
    parse_job(jobfile.read(path).document)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(run:.*?)```", TRAINING, re.DOTALL))
def test_a_recipe_in_the_documentation_is_taken(tmp_path: Path, block: str) -> None:
    taken(tmp_path, f"name: shown\nresources: {{gpus: 8}}\n{block}")


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_line_of_a_technique_is_all_that_it_needs(tmp_path: Path, technique: str) -> None:
    args = f"data: {{paths: [unread]}}, {TECHNIQUES[technique]}"
    run = f"run: {{recipe: lm, args: {{{args}}}}}"
    taken(tmp_path, f"name: shown\nresources: {{gpus: {GPUS.get(technique, 8)}}}\n{run}")


def test_infrequent_sync_goes_with_the_evaluations_that_are_usual(tmp_path: Path) -> None:
    args = f"data: {{format: images, paths: [unread]}}, {TECHNIQUES['infrequent sync (local SGD, DiLoCo)']}"
    taken(tmp_path, f"name: shown\nresources: {{gpus: 8}}\nrun: {{recipe: vision, args: {{{args}}}}}")
