"""Signs of life where no step is reported."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import phalanx
import pytest
import torch
from fsspec.implementations.memory import MemoryFile
from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.vision import VisionConfig
from phalanx_worker.training import checkpoint_reader, checkpoint_store, checkpoint_writer, loop
from phalanx_worker.training.checkpoint import Checkpointer
from phalanx_worker.training.data.held_out import separate
from phalanx_worker.training.evaluation import HeldOut
from phalanx_worker.training.health.life import GAP_S, LONGEST_WAIT_S, Life, life
from phalanx_worker.training.loop import Facts
from phalanx_worker.training.mesh import make_world, process_group


@pytest.fixture
def marks(monkeypatch):
    """The kinds of what was marked; every sign is due."""
    seen = []
    monkeypatch.setattr(phalanx, "alive", lambda: seen.append("alive"))
    monkeypatch.setattr("phalanx_worker.training.health.life.GAP_S", 0.0)
    monkeypatch.setattr(life, "_due", 0.0)
    return seen


@pytest.fixture
def clocked(monkeypatch):
    """A life by a clock that the test moves, in which every sign is due, and the times of its signs."""
    own = Life(clock=lambda: now[0])
    now, seen = [0.0], []
    monkeypatch.setattr(phalanx, "alive", lambda: seen.append(now[0]))
    monkeypatch.setattr("phalanx_worker.training.health.life.GAP_S", 0.0)
    return own, now, seen


class Slow:
    """A checkpointer that notes when it is at work."""

    def __init__(self, seen):
        self.seen = seen

    def restore(self, state, *, before=None):
        self.seen.append("restore")
        return 4

    def save(self, step, state, *, metrics, keep_before):
        self.seen.append("save")

    def finish(self):
        self.seen.append("finish")


def trainer_with(checkpointer) -> Any:
    monitor = SimpleNamespace(
        returned=lambda step: None, after_keep=lambda step, stall_s: None, keep_before=lambda step: None
    )
    layout = SimpleNamespace(outer=None, forget_left_out=lambda: None)
    return SimpleNamespace(checkpointer=checkpointer, state=dict, monitor=monitor, layout=layout)


def test_a_sign_of_life_is_given_at_most_once_in_the_gap(monkeypatch):
    seen, now = [], [100.0]
    monkeypatch.setattr(phalanx, "alive", lambda: seen.append(now[0]))
    own = Life(clock=lambda: now[0])
    for now[0] in (100.0, 101.0, 100.0 + GAP_S, 101.0 + GAP_S):
        own.show()
    assert seen == [100.0, 100.0 + GAP_S]


def test_a_restore_at_the_start_and_in_a_rollback_is_between_signs_of_life(marks):
    trainer = trainer_with(Slow(marks))
    assert loop._resume(trainer) == 4
    assert loop._go_back(trainer, 9) == 4
    assert marks == ["alive", "restore", "alive"] * 2


def test_a_save_and_the_wait_for_the_last_one_are_between_signs_of_life(marks):
    trainer = trainer_with(Slow(marks))
    loop._keep(trainer, Facts(5, 1.0, 1.0, 1.0, True, step_time_s=1.0, data_wait_s=0.0))
    loop._finish(trainer)
    assert marks == ["alive", "save", "alive", "alive", "finish", "alive"]


def test_every_batch_of_an_evaluation_is_a_sign_of_life(marks):
    config = VisionConfig(data=DataConfig(format="digits"), evaluate=Evaluate(share=0.1, batch=64))
    _, kept_back = separate(config.data, config.evaluate)
    assert kept_back is not None
    with process_group(torch.device("cpu")):
        world = make_world(Parallel(data=1), torch.device("cpu"))
        batches = sum(1 for _ in HeldOut(kept_back, config, world))
    assert marks == ["alive"] * batches == ["alive"] * 3


# ------------------------------------------------------------------ while a storage is slow

HANGS_S = 20.0  # of a test that waits for what does not come


class Tensors:
    """A piece of state: a tensor of many pieces."""

    def __init__(self, value):
        self.tensor = torch.full((4096,), float(value))

    def state_dict(self):
        return {"tensor": self.tensor}

    def load_state_dict(self, state):
        self.tensor.copy_(state["tensor"])


class SlowStorage:
    """Storage in memory, where each call of `what` comes through after `before()`; `calls` counts them."""

    def __init__(self, monkeypatch, marks):
        self.calls, self.given, self.marks, self._monkeypatch = 0, 0, marks, monkeypatch
        for module in (checkpoint_writer, checkpoint_reader):
            monkeypatch.setattr(module, "PIECE_BYTES", 1024)
        monkeypatch.setattr(checkpoint_store, "READ_BYTES", 1024)

    def slow_down(self, what, before):
        inner = getattr(MemoryFile, what)

        def slow(file, *given):
            self.calls += 1
            before()
            answer = inner(file, *given)
            self.given = len(self.marks)  # before the rank can know that it came through
            return answer

        self._monkeypatch.setattr(MemoryFile, what, slow, raising=False)

    def await_sign(self):
        """No piece comes through before a sign was given of the one before it."""
        deadline = time.monotonic() + HANGS_S
        while self.calls > 1 and len(self.marks) == self.given:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.001)


@pytest.fixture
def storage(monkeypatch, marks):
    monkeypatch.setattr("phalanx_worker.training.health.life.LOOK_S", 0.001)
    return SlowStorage(monkeypatch, marks)


@pytest.fixture
def checkpointer(request):
    config = CheckpointConfig(asynchronous=getattr(request, "param", False))
    return Checkpointer(config, f"memory://life-{id(request)}", register=lambda *_, **__: None)


@pytest.mark.parametrize("checkpointer", [False, True], indirect=True)
def test_a_slow_save_gives_a_sign_of_life_from_piece_to_piece(storage, checkpointer):
    storage.slow_down("write", storage.await_sign)
    with life.around():
        checkpointer.save(1, {"tensors": Tensors(1)})
        checkpointer.finish()
    assert storage.calls > 16
    assert checkpointer.failures == 0


@pytest.mark.parametrize("what", ["read", "readinto"])
def test_a_slow_restore_gives_a_sign_of_life_from_piece_to_piece(storage, checkpointer, what):
    checkpointer.save(1, {"tensors": Tensors(1)})
    storage.slow_down(what, storage.await_sign)
    restored = Tensors(0)
    with life.around():
        assert checkpointer.restore({"tensors": restored}) == 1
    assert storage.calls > 4
    assert bool((restored.tensor == 1).all())


def test_a_save_that_hangs_gives_no_sign_of_life(marks, storage, checkpointer, monkeypatch):
    stuck, release, looks = threading.Event(), threading.Event(), threading.Semaphore(0)
    look = life.look

    def counted():
        look()
        looks.release()

    def look_times(times):
        while looks.acquire(blocking=False):
            pass
        assert all(looks.acquire(timeout=HANGS_S) for _ in range(times))

    def hang():
        stuck.set()
        assert release.wait(HANGS_S)

    monkeypatch.setattr(life, "look", counted)
    storage.slow_down("write", lambda: storage.calls == 4 and hang())

    def save():
        with life.around():
            checkpointer.save(1, {"tensors": Tensors(1)})

    saving = threading.Thread(target=save)
    saving.start()
    try:
        assert stuck.wait(HANGS_S)
        look_times(2)  # the first may still notice the pieces before
        given = len(marks)
        look_times(5)
        assert len(marks) == given
    finally:
        release.set()
        saving.join()
    assert len(marks) > given


def test_who_waits_for_others_lives_as_long_as_they_may_take(clocked):
    own, now, seen = clocked
    with own.around():
        seen.clear()
        for now[0] in (1.0, LONGEST_WAIT_S - 1, LONGEST_WAIT_S + 1):
            own.look()
    assert seen == [1.0, LONGEST_WAIT_S - 1, LONGEST_WAIT_S + 1]
    assert seen.count(LONGEST_WAIT_S + 1) == 1, "the one at the end"


def test_who_is_at_the_storage_lives_by_what_comes_through_alone(clocked):
    own, now, seen = clocked
    with own.around(), own.at_storage():
        seen.clear()
        now[0] = 1.0
        own.look()
        own.moved()
        now[0] = 2.0
        own.look()
        now[0] = 3.0
        own.look()
        assert seen == [2.0]
