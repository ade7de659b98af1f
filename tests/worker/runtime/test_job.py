"""The in-job API (`phalanx.report` and its kin) against the other end of its socket."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import phalanx
import pytest
from phalanx import job

Receive = Callable[[], list[dict[str, Any]]]


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
def received(runner_end: socket.socket) -> Receive:
    def receive() -> list[dict[str, Any]]:
        messages = []
        while True:
            try:
                messages.append(json.loads(runner_end.recv(65536, socket.MSG_DONTWAIT)))
            except BlockingIOError:
                return messages

    return receive


def test_report_carries_numbers_of_every_kind(received: Receive) -> None:
    import torch

    values = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "numpy": numpy.float32(0.25),
        "numpy_int": numpy.int64(7),
        "torch": torch.tensor(1.5, requires_grad=True),
        "nan": float("nan"),
        "minus_infinity": numpy.float64("-inf"),
    }
    phalanx.report(step=numpy.int64(4), **values)
    (message,) = received()
    assert message["step"] == 4 and abs(message["at"] - time.time()) < 5
    assert message["values"] == {
        "int": 3,
        "float": 0.5,
        "bool": 1,
        "numpy": 0.25,
        "numpy_int": 7,
        "torch": 1.5,
        "nan": "nan",
        "minus_infinity": "-inf",
    }


def test_report_drops_what_is_no_number_and_counts_it(received: Receive) -> None:
    phalanx.report(step=1, loss=1.0, text="hello", many=numpy.zeros(3), nothing=None, object=object())
    phalanx.report(step=2, loss=2.0)
    dropped, first, second = received()
    assert first["values"] == {"loss": 1.0} and second["values"] == {"loss": 2.0}
    assert (dropped["kind"], dropped["data"]) == ("dropped", {"what": "metrics", "count": 4})


def test_report_that_is_too_big_is_dropped_and_counted(received: Receive) -> None:
    phalanx.report(**{f"{'x' * 100}{number}": 1.0 for number in range(1000)})
    phalanx.report(loss=1.0)
    dropped, point = received()
    assert dropped["data"]["count"] == 1000 and point["values"] == {"loss": 1.0}


def test_report_says_total_steps_once(received: Receive) -> None:
    for step in range(3):
        phalanx.report(step=step, total_steps=100)
    assert [message["t"] for message in received()] == ["mark", "metrics", "metrics", "metrics"]


def test_a_new_total_does_not_wait_for_room(received: Receive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.time, "sleep", lambda _: pytest.fail("it waited"))
    for step in range(5000):
        phalanx.report(step=step, loss=1.0)
    phalanx.report(step=5000, total_steps=100, loss=1.0)
    received()
    phalanx.report(step=5001, total_steps=100, loss=1.0)
    assert {"total_steps": 100} in [message.get("data") for message in received()]


def test_report_never_blocks_and_marks_wait_their_turn(received: Receive) -> None:
    started = time.monotonic()
    for step in range(5000):
        phalanx.report(step=step, loss=1.0)
    assert time.monotonic() - started < 60, "if each waited as a mark does, it would take a quarter of an hour"
    phalanx.finished()  # no room: waits a moment, then stays behind
    taken = received()
    assert len(taken) < 5000
    phalanx.report(step=5000, loss=1.0)
    kinds = [message.get("kind") for message in received()]
    assert kinds == ["finished", "dropped", None] or kinds == ["dropped", "finished", None]


def test_signs_of_life_push_no_mark_out_that_waits(received: Receive) -> None:
    for step in range(5000):
        phalanx.report(step=step, loss=1.0)
    phalanx.checkpoint("/kept", step=5000)  # no room
    for _ in range(100):
        phalanx.alive()
    received()
    phalanx.alive()
    assert [message["kind"] for message in received()][-2:] == ["checkpoint", "alive"]


def test_report_survives_the_end_of_the_runner(runner_end: socket.socket) -> None:
    runner_end.close()
    phalanx.report(step=1, loss=1.0)
    assert phalanx.should_stop() is False


def test_should_stop_when_told_through_the_socket(runner_end: socket.socket) -> None:
    assert phalanx.should_stop() is False
    runner_end.send(b'{"t": "stop"}')
    assert phalanx.should_stop() is True
    assert phalanx.should_stop() is True


def test_should_stop_takes_sigterm_over_but_no_handler_of_the_script(
    runner_end: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert phalanx.should_stop() is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert phalanx.should_stop() is True
        mine = lambda *_: None  # noqa: E731
        signal.signal(signal.SIGTERM, mine)
        monkeypatch.setattr(job._link(), "_watches_sigterm", False)
        phalanx.should_stop()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("root", "path", "url"),
    [
        ("/ckpt/job", "step-1", "/ckpt/job/step-1"),
        ("s3://bucket/job/", "step-1", "s3://bucket/job/step-1"),
        ("/ckpt/job", "/other/step-1", "/other/step-1"),
        ("/ckpt/job", "s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_checkpoint_resolves_relative_paths(
    received: Receive, monkeypatch: pytest.MonkeyPatch, root: str, path: str, url: str
) -> None:
    monkeypatch.setenv("PHALANX_CHECKPOINT_DIR", root)
    phalanx.checkpoint(path, step=3, loss=0.5)
    (message,) = received()
    assert (message["kind"], message["data"]) == ("checkpoint", {"url": url, "step": 3, "loss": 0.5})


def test_a_checkpoint_is_registered_whatever_is_said_with_it(received: Receive) -> None:
    import torch

    said = {"loss": float("nan"), "norm": torch.tensor(1.5), "note": None, "tags": ["a"], "model": object(), "url": "x"}
    phalanx.checkpoint("/c/1", step=1, **said)
    phalanx.checkpoint("/c/2", step=2, history="x" * job.MAX_MESSAGE_BYTES)
    phalanx.checkpoint("/c/3", step=3, **{f"part{i}": "x" * 2000 for i in range(20)})
    phalanx.report(step=4)
    first, second, third, dropped, _ = received()
    sent = {"url": "/c/1", "step": 1, "loss": "nan", "norm": 1.5, "note": None, "tags": ["a"]}
    assert (first["kind"], first["data"]) == ("checkpoint", sent)
    assert second["data"] == {"url": "/c/2", "step": 2} and third["data"] == {"url": "/c/3", "step": 3}
    assert dropped["data"]["count"] == 1 + 1 + 20


def test_a_checkpoint_without_a_step_is_of_the_last_one_that_was_reported(received: Receive) -> None:
    phalanx.checkpoint("/c/0")
    phalanx.report(step=7)
    phalanx.checkpoint("/c/7")
    assert [message["data"]["step"] for message in received() if message["t"] == "mark"] == [0, 7]


def test_what_is_dropped_at_the_end_is_told_when_the_process_ends(runner_end: socket.socket) -> None:
    """As a rank does: it fills the socket and leaves."""
    script = "import phalanx\nfor step in range(5000): phalanx.report(step=step, loss=1.0)"
    fd = int(os.environ["PHALANX_REPORT_FD"])
    with subprocess.Popen([sys.executable, "-c", script], pass_fds=[fd]) as rank:
        points = dropped = 0
        while points + dropped < 5000:
            message = json.loads(runner_end.recv(65536))
            points += message["t"] == "metrics"
            dropped += message["data"]["count"] if message["t"] == "mark" else 0
    assert (points + dropped, rank.returncode) == (5000, 0)


@pytest.mark.parametrize("value", ["", "nonsense", "1", "9999"], ids=["empty", "no number", "no socket", "closed"])
def test_outside_a_job_everything_does_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PHALANX_REPORT_FD", value)
    monkeypatch.setattr(job, "_links", {})
    before = signal.getsignal(signal.SIGTERM)
    phalanx.report(step=1, loss=object())
    phalanx.checkpoint("x", step=1)
    phalanx.finished()
    assert phalanx.should_stop() is False
    assert signal.getsignal(signal.SIGTERM) is before


def test_import_is_light() -> None:
    """Counted in modules, not in seconds, which depend on what else the machine does; the budget is 0.1 s."""
    probe = (
        "import sys; before = set(sys.modules); import phalanx; phalanx.report(step=1); "
        "print(*set(sys.modules) - before)"
    )
    imported = subprocess.check_output([sys.executable, "-c", probe], text=True).split()
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"phalanx"}
    assert len(imported) < 100, imported
