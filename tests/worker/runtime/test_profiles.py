"""Traces that are taken between the steps of an optimizer, in this process, with the runner's end of the socket."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import job
from phalanx_worker.runtime import profiles as runtime_profiles
from phalanx_worker.runtime.profiles import Profiles
from torch.optim.optimizer import register_optimizer_step_post_hook


class Training:
    """Two layers and their optimizer, whose steps `profiles` sees as in a rank."""

    def __init__(self, profiles: Profiles, runner_end: socket.socket, directory: Path) -> None:
        self.profiles = profiles
        self.runner_end = runner_end
        self.file = directory / "trace.json.gz"
        self.model = torch.nn.Linear(8, 8)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self, times: int = 1, take: Callable[[], Any] | None = None) -> None:
        for _ in range(times):
            self.model(torch.ones(2, 8)).sum().backward()
            (take or self.optimizer.step)()

    def ask(self, steps: int = 3, *, file: Path | None = None, until: float | None = None) -> None:
        message = {"t": "profile", "id": "prof_1", "steps": steps, "file": str(file or self.file)}
        self.runner_end.send(json.dumps({**message, "until": until or time.time() + 60}).encode())
        self.profiles._look_at = 0.0  # a request is looked for every 50 ms

    def said(self) -> list[tuple[str, str]]:
        """States and reasons so far, once nothing is being written."""
        if self.profiles._writing is not None:
            self.profiles._writing.join(30)
        found = []
        while True:
            try:
                message = json.loads(self.runner_end.recv(65536, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return found
            assert (message["t"], message["kind"], message["data"]["id"]) == ("mark", "profile", "prof_1")
            found.append((message["data"]["state"], message["data"].get("reason", "")))

    def names(self, beginning: str) -> list[str]:
        """Of ranges in the trace, in the order of their beginnings."""
        events = json.loads(gzip.decompress(self.file.read_bytes()))["traceEvents"]
        ranges = sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])
        return [event["name"] for event in ranges if event["name"].startswith(beginning)]


@pytest.fixture
def runner_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setenv("PHALANX_REPORT_FD", str(theirs.fileno()))
    monkeypatch.setattr(job, "_links", {})
    with ours, theirs:
        yield ours
        for link in job._links.values():
            if link is not None:
                link._socket.detach()


@pytest.fixture
def training(runner_end: socket.socket, tmp_path: Path) -> Iterator[Training]:
    profiles = Profiles(lambda: None)
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: profiles.after_step(optimizer))
    yield Training(profiles, runner_end, tmp_path)
    handle.remove()


DONE = [("recording", ""), ("written", "")]


def test_the_steps_that_were_asked_for_are_recorded_and_no_other(training: Training) -> None:
    training.ask(steps=3)
    training.step(20)
    assert training.said() == DONE
    assert training.names("ProfilerStep#") == ["ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"]
    assert training.names("Optimizer.step#") == ["Optimizer.step#SGD.step"] * 3
    assert training.names("aten::addmm")
    assert "step" not in vars(training.optimizer)
    assert [path.name for path in training.file.parent.iterdir()] == [training.file.name]


def test_a_second_request_is_taken_after_the_first(training: Training) -> None:
    training.ask(steps=1)
    training.step(5)
    assert training.said() == DONE
    training.ask(steps=2)
    training.step(6)
    assert training.said() == DONE
    assert len(training.names("ProfilerStep#")) == 2


def test_steps_of_another_optimizer_do_not_count(training: Training) -> None:
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    training.ask(steps=2)
    for _ in range(8):
        training.step()
        other.step()
        other.step()
    assert training.said() == DONE
    assert len(training.names("ProfilerStep#")) == 2
    assert len(training.names("Optimizer.step#")) == 6


def test_a_script_that_has_kept_the_step_method_is_recorded_too(training: Training) -> None:
    take = training.optimizer.step
    training.ask(steps=3)
    training.step(20, take)
    assert training.said() == DONE
    assert len(training.names("ProfilerStep#")) == 3


def test_a_schedule_that_is_made_while_it_records_wraps_what_is_there(training: Training) -> None:
    training.ask(steps=3)
    training.step(3)
    schedule = torch.optim.lr_scheduler.StepLR(training.optimizer, 1, gamma=0.5)
    for _ in range(10):
        training.step()
        schedule.step()
    assert training.said() == DONE
    assert len(training.names("ProfilerStep#")) == 3
    assert training.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**10


def test_a_profile_of_the_scripts_own_goes_on_and_ours_says_why_it_failed(training: Training) -> None:
    training.ask()
    training.step()
    with torch.profiler.profile() as own:
        training.step(3)
    ((state, reason),) = training.said()
    assert state == "failed" and "a profile of its own" in reason
    assert any(event.key == "aten::addmm" for event in own.key_averages())
    training.step(3)


def test_a_file_that_cannot_be_written_is_a_reason(training: Training, tmp_path: Path) -> None:
    training.ask(steps=1, file=tmp_path / "absent" / "trace.json.gz")
    training.step(6)
    recording, (state, reason) = training.said()
    assert recording == ("recording", "") and state == "failed" and "absent" in reason


def test_a_script_that_ends_before_says_how_far_it_came(training: Training) -> None:
    training.ask(steps=9)
    training.step(6)
    training.profiles.end()
    assert training.said() == [("recording", ""), ("failed", "the script ended after 3 of 9 steps")]
    training.step(3)


def late(training: Training, steps: int) -> None:
    """Has recorded so many steps when its time is over."""
    training.ask(steps=9)
    training.step(3 + steps)
    recording = training.profiles._recording
    assert recording is not None
    recording._timer.join(10)
    assert recording.is_late


TOO_LONG = "it came to 2 of 9 steps in 1 s, the most that is recorded: ask for fewer"


def test_a_recording_whose_time_is_over_says_so_and_collects_no_more_before_the_next_step(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_profiles, "RECORDING_S", 0.6)
    late(training, steps=2)
    assert training.said() == [("recording", ""), ("failed", TOO_LONG)]
    profiler = training.profiles._recording._profiler  # type: ignore[union-attr]
    for _ in range(50):
        torch.erfinv(torch.zeros(1))  # an evaluation
    profiler.stop()
    names = [event.name for event in profiler.events()]
    assert "aten::addmm" in names and "aten::erfinv" not in names


def test_the_step_after_a_recording_whose_time_is_over_ends_it_and_another_can_be_taken(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_profiles, "RECORDING_S", 0.6)
    late(training, steps=2)
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    other.step()
    assert training.profiles._recording is None and "step" not in vars(training.optimizer)
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    assert training.said() == [("recording", ""), ("failed", TOO_LONG)]
    monkeypatch.setattr(runtime_profiles, "RECORDING_S", 60.0)
    training.ask(steps=2)
    training.step(6)
    assert training.said() == DONE
    assert len(training.names("ProfilerStep#")) == 2


def test_a_recording_in_time_leaves_no_timer(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_profiles, "RECORDING_S", 1.0)
    training.ask(steps=1)
    training.step(5)
    time.sleep(1.2)
    assert training.said() == DONE


@pytest.mark.parametrize("more", [{"until": 1.0}, {"steps": "many"}, {"file": None}])
def test_what_comes_too_late_or_makes_no_sense_is_passed_over(training: Training, more: dict[str, Any]) -> None:
    message = {"t": "profile", "id": "prof_1", "steps": 2, "file": str(training.file), "until": time.time() + 60}
    sent = {name: value for name, value in {**message, **more}.items() if value is not None}
    training.runner_end.send(json.dumps(sent).encode())
    training.step(6)
    assert training.said() == []
    assert "step" not in vars(training.optimizer)


def test_the_first_step_is_told_once(runner_end: socket.socket) -> None:
    told: list[bool] = []
    profiles = Profiles(lambda: told.append(True))
    for _ in range(3):
        profiles.after_step(object())
    assert told == [True]
