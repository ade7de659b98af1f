"""Profiles as a runner passes them on: from its agent's word to a trace on the server, while the ranks run."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node.profiles import Profiles

pytestmark = pytest.mark.asyncio(loop_scope="session")

TRAIN = """
    import pathlib, torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(lambda *_: None)  # one of the script's own is not in the way
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    print("begins")
    while not pathlib.Path({stop!r}).exists():
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
"""
PROFILE = "prof_" + "1" * 32


def request(*ranks: int, steps: int = 2) -> dict[str, Any]:
    return {"profile_id": PROFILE, "steps": steps, "ranks": list(ranks)}


def states(attempt: Any, rank: int = 0) -> list[str]:
    marks = attempt.server.marks(attempt.id, "profile")
    return [mark["data"]["state"] for mark in marks if mark["rank"] == rank]


def reason(attempt: Any, rank: int = 0) -> str:
    marks = attempt.server.marks(attempt.id, "profile")
    return next(mark["data"]["reason"] for mark in marks if mark["rank"] == rank and "reason" in mark["data"])


async def test_a_trace_reaches_the_server_while_its_rank_runs(workbench: Any, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    attempt = workbench.attempt(f"python {workbench.script(TRAIN.format(stop=str(stop)))}", ranks=2)
    await attempt.start()
    for _ in range(2):  # again, as the next agent would
        await attempt.runners[0].profile_group(attempt.id, request(1, 7))
    await attempt.server.until(lambda: (attempt.id, PROFILE, 1) in attempt.server.traces, 60)
    events = json.loads(gzip.decompress(attempt.server.traces[attempt.id, PROFILE, 1]))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 2
    await attempt.server.until(lambda: "written" in states(attempt, rank=1))
    assert states(attempt, rank=1) == ["recording", "written"] and states(attempt, rank=0) == []
    stop.touch()
    assert [end["exit_code"] for end in await attempt.exits()] == [0, 0]
    assert attempt.server.marks(attempt.id, "first_step")


async def test_a_command_whose_steps_cannot_be_seen_says_so(workbench: Any) -> None:
    attempt = workbench.attempt("sh -c 'echo begins; sleep 60'")
    await attempt.start()
    await attempt.runners[0].profile_group(attempt.id, request(0))
    await attempt.server.until(lambda: states(attempt) == ["failed"])
    assert "not a plain `python script.py`" in reason(attempt)


async def test_a_rank_without_steps_is_waited_for_only_so_long(workbench: Any, monkeypatch: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script('import time; time.sleep(60)')}")
    await attempt.start()
    profiles: Profiles = attempt.runners[0]._duties.profiles
    monkeypatch.setattr(profiles, "_first_step_s", 0.1)
    await attempt.runners[0].profile_group(attempt.id, request(0))
    await attempt.server.until(lambda: states(attempt) == ["failed"])
    assert "no optimizer step" in reason(attempt)


BEGINS_ONLY = """
    import time
    from phalanx import job
    while job.next_profile() is None:
        time.sleep(0.01)
    while True:
        job.mark("profile", id="{profile}", state="recording")
        time.sleep(0.1)
"""


async def test_a_trace_that_is_being_recorded_is_waited_for_only_so_long(workbench: Any, monkeypatch: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script(BEGINS_ONLY.format(profile=PROFILE))}")
    await attempt.start()
    profiles: Profiles = attempt.runners[0]._duties.profiles
    monkeypatch.setattr(profiles, "_recorded_s", 1.0)
    await attempt.runners[0].profile_group(attempt.id, request(0))
    await attempt.server.until(lambda: "failed" in states(attempt))
    assert "after it began to record" in reason(attempt)


async def test_an_attempt_that_is_not_here_is_asked_nothing(workbench: Any) -> None:
    await workbench.runners[0].profile_group("att_absent", request(0))


LIES = """
    import os, time
    from phalanx import job
    name, absent = "{profile}", "prof_" + "2" * 32
    while (asked := job.next_profile()) is None:
        time.sleep(0.01)
    job.mark("profile", id=absent, state="written", bytes=5)
    os.symlink("/etc/passwd", asked["file"])
    job.mark("profile", id=name, state="written", bytes=os.stat("/etc/passwd").st_size)
    job.mark("profile", id=name, state="written", bytes=5)
    print("lied")
    time.sleep(60)
"""


async def test_a_rank_that_lies_gives_away_nothing_of_the_node(workbench: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script(LIES.format(profile=PROFILE))}")
    await attempt.start()
    await attempt.runners[0].profile_group(attempt.id, request(0))
    await attempt.printed("lied")
    await attempt.server.until(lambda: "failed" in states(attempt))
    assert "a file changed, or could not be read" in reason(attempt)
    assert not [trace for trace in attempt.server.traces if trace[0] == attempt.id]


async def test_a_trace_that_is_on_its_way_comes_before_the_end_of_its_group(workbench: Any, tmp_path: Path) -> None:
    """The server takes none of an attempt that has ended."""
    stop = tmp_path / "stop"
    attempt = workbench.attempt(f"python {workbench.script(TRAIN.format(stop=str(stop)))}")
    await attempt.start()
    attempt.server.output_answers = [503] * 3 + [200]
    await attempt.runners[0].profile_group(attempt.id, request(0))
    await attempt.server.until(lambda: "written" in states(attempt), 60)
    stop.touch()
    async with asyncio.timeout(30):
        await attempt.exits()
    assert (attempt.id, PROFILE, 0) in attempt.server.traces
    attempt.server.output_answers = []
