"""Warnings cost little, whatever a job says, and never keep a job out."""

from typing import Any

import pytest
from phalanx.recipes import memory
from phalanx_server.actions import submit_warnings
from phalanx_server.actions.submit_warnings import memory_warnings
from phalanx_server.domain.memory_estimate import estimate_of
from phalanx_server.domain.spec import JobSpec, parse_job

TYPES = ["t4", "l4", "a10", "of-tomorrow"]
LARGE = {"layers": 4096, "width": 4096}


def job(**model: Any) -> JobSpec:
    args = {"data": {"paths": ["unread"]}, "model": model}
    return parse_job({"name": "a", "resources": {"gpus": 4, "gpu_types": TYPES}, "run": {"recipe": "lm", "args": args}})


async def test_a_job_that_does_not_fit_is_told_so_for_each_type_whose_memory_is_known():
    small, large = await memory_warnings([job(), job(**LARGE)])
    assert small == []
    assert [text.split(":")[0] for text in large] == [f"each rank does not fit on {name}" for name in TYPES[:3]]


def test_what_would_help_is_worked_out_once_for_all_types(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    remedies = memory.remedies
    monkeypatch.setattr(memory, "remedies", lambda config, ranks: asked.append(ranks) or remedies(config, ranks))
    found = estimate_of(job(**LARGE), ())
    assert found is not None and len(found.on) == 3 and asked == [4]


async def test_a_warning_that_cannot_be_worked_out_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def broken(spec: JobSpec, gpu_types: object) -> None:
        raise OverflowError("int too large to convert to float")

    monkeypatch.setattr(submit_warnings, "estimate_of", broken)
    assert await memory_warnings([job(), job(**LARGE)]) == [[], []]


async def test_jobs_after_the_time_is_used_up_go_without():
    first, second = await memory_warnings([job(**LARGE)] * 2, most_s=1e-9)
    assert first and not second
